"""The floats: bit-equal to the two transformers processors, in every layout and type."""

from __future__ import annotations

import PIL
import pytest
import torch
from PIL import Image
from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, HALF, Target, ref
from vtengine_kernels.patchify.normalise import level_table

PILLOW = "pil13" if int(PIL.__version__.split(".")[0]) >= 13 else "pil12"
SIZES = [(1, 1), (28, 28), (90, 37), (300, 500), (511, 130), (768, 1024)]


QWEN3 = {"patch": 16, "mean": HALF, "std": HALF}


def make_processor(**options):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.Qwen2VLImageProcessorPil(**options)


@pytest.fixture(scope="module")
def processor():
    return make_processor(min_pixels=3136, max_pixels=12845056)


@pytest.fixture(scope="module")
def qwen3_processor():
    """As Qwen3-VL's preprocessor_config.json has it."""
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    return make_processor(size=size, patch_size=16, image_mean=list(HALF), image_std=list(HALF))


def assert_equal_to(processor, run, image, **options):
    made = processor(images=[Image.fromarray(image)], return_tensors="pt")
    height, width = (options.get("patch", 14) * side for side in made["image_grid_thw"][0].tolist()[1:])
    rows = run(image, [Target(height, width)], mode=PILLOW, **options)[0]
    assert rows.dtype == made["pixel_values"].dtype
    assert torch.equal(rows, made["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_transformers(run, picture, processor, size):
    assert_equal_to(processor, run, picture(*size))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_transformers_for_qwen3_vl(run, picture, qwen3_processor, size):
    assert_equal_to(qwen3_processor, run, picture(*size), **QWEN3)


@pytest.mark.parametrize("patch", [14, 16])
def test_compact_is_one_frame_of_full(run, picture, patch):
    image, target = picture(100, 150), Target(6 * patch, 12 * patch)
    full = run(image, [target], patch=patch)[0].view(-1, 3, 2, patch**2)
    compact = run(image, [target], layout="compact", patch=patch)[0].view(-1, 3, patch**2)
    assert torch.equal(full[:, :, 0], compact)
    assert torch.equal(full[:, :, 1], compact)


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("patch", [14, 16])
def test_bfloat16_is_the_rounded_float(run, picture, layout, patch):
    image, target = picture(100, 150), Target(6 * patch, 12 * patch)
    floats = run(image, [target], layout=layout, patch=patch)[0]
    rounded = run(image, [target], layout=layout, patch=patch, dtype=torch.bfloat16)[0]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, floats.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.0, 0.25, 1.0), (1.0, 3.0, 1e-3)),
        ((1e30, -1e30, 0.1), (1e-30, 1e30, 1e-38)),  # overflows: the arithmetic gives way to the table
    ],
)
@pytest.mark.parametrize("mode", ["pil13", "tv"])
@pytest.mark.parametrize("patch", [14, 16])
def test_any_mean_and_std(run, mean, std, mode, patch):
    side = 2 * patch
    ramp = torch.arange(side * side * 3).remainder(256).to(torch.uint8).view(side, side, 3).numpy()
    for dtype in (torch.float32, torch.bfloat16):
        rows = run(ramp, [Target(side, side)], mean=mean, std=std, dtype=dtype, mode=mode, patch=patch)[0]
        expected = torch.from_numpy(ref.lookup(level_table(mean, std, mode), ref.patches(ramp, 2, patch))).to(dtype)
        assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))


def test_the_table_is_what_transformers_computes(processor):
    import numpy as np

    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256).repeat(3, axis=0)
    rescaled = processor.rescale(levels, 1 / 255)
    expected = processor.normalize(rescaled, list(CLIP_MEAN), list(CLIP_STD))
    assert np.array_equal(level_table(CLIP_MEAN, CLIP_STD, "pil13"), np.asarray(expected)[:, 0].astype(np.float32))


@pytest.mark.parametrize(
    ("mean", "std"), [(CLIP_MEAN, CLIP_STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.0, 1.0), (1.0, 3.0, 1e-3))]
)
def test_tv_floats_are_those_of_the_torchvision_processor(run, mean, std):
    """Its formula, in torch: mean and std times 255 once, then two operations on the levels as floats."""
    levels = torch.arange(28 * 28 * 3).remainder(256).to(torch.uint8).view(28, 28, 3)
    scale = 1.0 / (1 / 255)
    shift, divisor = (torch.tensor(values)[:, None, None] * scale for values in (mean, std))
    planes = levels.permute(2, 0, 1).to(torch.float32).sub(shift).div_(divisor)
    expected = planes.view(3, 1, 2, 14, 1, 2, 14).permute(1, 4, 2, 5, 0, 3, 6).reshape(4, 588)
    rows = run(levels.numpy(), [Target(28, 28)], mean=mean, std=std, mode="tv", layout="compact")[0]
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("patch", [14, 16])
def test_order_of_rows_and_columns(run, patch):
    """Rows: window by window, each its four patches; columns: channel, frame, y, x."""
    height, width = 4 * patch, 6 * patch
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[..., 0] = torch.arange(height).view(-1, 1)
    image[..., 1] = torch.arange(width).view(1, -1)
    rows = run(image.numpy(), [Target(height, width)], mean=(0.0,) * 3, std=(1.0,) * 3, patch=patch)[0]
    seen = (rows.view(-1, 3, 2, patch, patch) * 255).round().int()
    for index in range(rows.shape[0]):
        window, inside = divmod(index, 4)
        top, left = patch * (2 * (window // 3) + inside // 2), patch * (2 * (window % 3) + inside % 2)
        assert seen[index, 0, 1, 5, 9] == top + 5
        assert seen[index, 1, 0, 5, 9] == left + 9
        assert seen[index, 2].abs().max() == 0
