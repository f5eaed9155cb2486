"""What is sent to SGLang, and what is refused before."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from vtengine_kernels.patchify import Target, patchify

from tests.engine.sglang.backends import TINY
from tests.engine.tiny import PAD, STOP, VIDEO, image, prompt, request
from vtengine.engine.base import ImageInput, RequestRejected, SamplingParams
from vtengine.engine.sglang import ServedModel, checks, translation
from vtengine.engine.sglang.pixels import PngCache, full_layout, image_bytes
from vtengine.engine.sglang.transport import ServerFacts, ServerUnsuitable
from vtengine.vision.processor import image_processor


def test_tensors_are_full_patches_with_inclusive_offsets():
    low, high = image(1), image(2, h=6, w=8, width=1176)
    ask = request("a", prompt(3, 9, [low, high]), [low, high])
    payload = translation.with_tensors(ask, TINY, translation.check(ask, TINY))
    (item,) = payload["image_data"]
    assert payload["input_ids"] == list(ask.token_ids)
    assert item["format"] == "processor_output" and "hash" not in item and "mm_hashes" not in payload
    assert item["pixel_values"].shape == (24 + 48, 1176)
    assert item["image_grid_thw"].tolist() == [[1, 4, 6], [1, 6, 8]]
    for (start, end), picture in zip(item["offsets"], (low, high), strict=True):
        assert end - start + 1 == picture.visual_tokens
        assert set(ask.token_ids[start : end + 1]) == {PAD}
        assert ask.token_ids[start - 1] == 253 and ask.token_ids[end + 1] == 254
    frames = item["pixel_values"][:24].view(24, 3, 2, 196)
    assert torch.equal(frames[:, :, 0], low.pixel_values.view(24, 3, 196)) and torch.equal(*frames.unbind(2))


def test_over_http_each_image_has_one_placeholder():
    pictures = [image(1), image(2, h=6, w=8)]
    ask = request("a", prompt(3, 9, pictures), pictures)
    payload = translation.with_png(ask, TINY, translation.check(ask, TINY), lambda picture, _: picture.content_hash)
    assert payload["input_ids"].count(PAD) == 2
    assert [i for i in payload["input_ids"] if i != PAD] == [i for i in ask.token_ids if i != PAD]
    assert payload["image_data"] == ["image-1", "image-2"]
    json.dumps(payload | translation.options(ask, TINY, True), allow_nan=False)


@pytest.mark.parametrize("layout", ["compact", "full"])
def test_the_png_holds_the_resized_bytes_exactly(layout):
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    (values,) = patchify(pixels, [Target(56, 84)], layout=layout, impl="ref")
    view = ImageInput("hash", (1, 4, 6), values)
    assert np.array_equal(image_bytes(view).numpy(), pixels)
    url = PngCache(1 << 20).data_url(view, "a")
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as png:
        assert png.mode == "RGB" and np.array_equal(np.asarray(png), pixels)
    assert full_layout(values, 1176).shape == (24, 1176)


@pytest.mark.parametrize("spoil", [lambda x: x.bfloat16(), lambda x: x * 1.01, lambda x: x + 40])
def test_pixels_that_are_no_bytes_are_refused(spoil):
    view = image(1)
    view = ImageInput("hash", view.grid_thw, spoil(view.pixel_values))
    with pytest.raises(RequestRejected, match="float32") as error:
        PngCache(1 << 20).data_url(view, "a")
    assert (error.value.code, error.value.blame) == ("pixels_not_exact", "setup")


def test_pngs_are_kept_up_to_a_limit():
    cache = PngCache(1)
    first = cache.data_url(image(1), "a")
    assert cache.data_url(image(1), "a") is first
    cache.data_url(image(2), "a")
    assert cache.data_url(image(1), "a") is not first and len(cache._urls) == 1


def test_sampling_parameters():
    sampling = SamplingParams(
        max_new_tokens=7, temperature=0.5, top_k=0, stop=("</a>",), stop_token_ids=(STOP,), seed=2**40 + 5,
        logit_bias={3: -math.inf, 4: 1.5},
    )  # fmt: skip
    params = translation.sampling_params(sampling, TINY, streamed=False)
    bans = {"3": translation.BAN, str(PAD): translation.BAN, str(VIDEO): translation.BAN}
    assert params["logit_bias"] == {**bans, "4": 1.5}
    assert params["top_k"] == -1 and params["stop"] == ["</a>"] and params["stop_token_ids"] == [STOP]
    assert params["no_stop_trim"] is True and params["sampling_seed"] == 5 and params["max_new_tokens"] == 7
    assert "ignore_eos" not in params  # it would switch stop_token_ids off as well
    unseeded = {translation.sampling_params(SamplingParams(), TINY, False)["sampling_seed"] for _ in range(8)}
    assert len(unseeded) > 1
    assert translation.sampling_params(SamplingParams(top_k=10**30), TINY, False)["top_k"] == 2**30


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (request("a", (1, 2, 256)), "token_out_of_range"),
        (request("a", (1, -1)), "token_out_of_range"),
        (request("a", (1, 2), stop=("",)), "invalid_sampling"),
        (request("a", (1, 2), logit_bias={256: 0.0}), "invalid_sampling"),
        (request("a", (1, 2), logit_bias={2: math.inf}), "invalid_sampling"),
        (request("a", (1, *[PAD] * 5, 2), [image(1)]), "image_tokens_mismatch"),
        (request("a", (1, *[PAD] * 12, 2), [image(1), image(2)]), "image_tokens_mismatch"),
        (request("a", (1, *[PAD] * 6, 2), [image(1, width=500)]), "image_shape"),
    ],
)
def test_what_would_break_sglang_is_refused(ask, code):
    with pytest.raises(RequestRejected, match="request a: ") as error:
        translation.check(ask, TINY)
    assert (error.value.code, error.value.blame) == (code, "setup")


def test_a_view_that_the_server_would_resize_is_refused_over_http():
    ask = request("a", (253, *[PAD] * 6, 254), [image(1)])
    small = ServedModel("m", 256, PAD, VIDEO, min_pixels=6000)
    with pytest.raises(RequestRejected, match=r"84 x 56 = 4704 pixels.*6000.*preprocessor_config\.json") as error:
        translation.with_png(ask, small, translation.check(ask, small), lambda *_: "")
    assert (error.value.code, error.value.blame) == ("image_outside_server_limits", "setup")


@pytest.mark.parametrize("marker", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_that_spells_a_marker_is_refused_over_http(marker):
    def decode(ids):
        return "".join("<|image_pad|>" if i == PAD else chr(i) for i in ids)

    model = replace(TINY, decode=decode)
    for text, refused in ((marker, True), ("<image_pad>", False)):
        ask = request("a", (253, *[PAD] * 6, 254, *map(ord, text)), [image(1)])
        spans = translation.check(ask, model)
        if refused:
            with pytest.raises(RequestRejected, match="spells") as error:
                translation.with_png(ask, model, spans, lambda *_: "")
            assert (error.value.code, error.value.blame) == ("text_spells_marker", "request")
        else:
            translation.with_png(ask, model, spans, lambda *_: "")


def test_the_served_model_is_read_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.config.to_json()))
    assert ServedModel.from_folder(tmp_path).min_pixels == 3136
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 784, "longest_edge": 9408}}')
    served = ServedModel.from_folder(tmp_path)
    assert (served.min_pixels, served.max_pixels, served.vocab_size, served.image_token_id) == (784, 9408, 256, PAD)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"preprocessor_config\.json: cannot be read as JSON"),
        ("[1]", r"preprocessor_config\.json: holds no JSON object"),
        ('{"min_pixels": "few"}', "min_pixels = 'few': must be a whole number of pixels"),
        ('{"min_pixels": 784, "max_pixels": 100}', "image processor's file: limits.max_pixels = 100: must be >= 784"),
        ('{"image_mean": [0.5, 0.5, 0.5]}', "image_mean = .*: only .* is supported"),
    ],
)
def test_an_image_processor_is_refused_as_anywhere_else(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(TINY.config.to_json()))
    (tmp_path / "preprocessor_config.json").write_text(content)
    for read in (ServedModel.from_folder, image_processor):
        with pytest.raises(ValueError, match=words):
            read(tmp_path)


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("0.5.17", True),
        ("0.5.23", True),
        ("0.5.17.post1", True),
        ("0.5.18+cu13", True),
        ("0.5.16", False),
        ("0.4.9", False),
        ("0.6.0", False),
        ("1.0", False),
        ("unknown", False),
    ],
)
def test_versions(version, good, caplog):
    if good:
        checks.check_version(version, "here")
        assert not caplog.records
    else:
        with pytest.raises(ServerUnsuitable, match=rf"SGLang {version};.*0\.5\.17 to 0\.5\.23: pip install"):
            checks.check_version(version, "here")


def test_a_version_that_was_never_run_is_taken_with_a_warning(caplog):
    checks.check_version("0.5.99", "here")
    assert "here: is SGLang 0.5.99, newer than any" in caplog.text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model_type": "llama"}, "wrong model.*llama"),
        ({"rl_on_policy_target": "fsdp"}, "rl-on-policy-target"),
        ({"skips_tokenizer": True}, "skip-tokenizer-init"),
    ],
)
def test_servers_that_would_answer_wrongly_are_refused(facts, words):
    known = {"version": "0.5.17", "model_path": "m", "model_type": "qwen2_5_vl", "weight_version": "default"}
    with pytest.raises(ServerUnsuitable, match=words):
        checks.check_facts(ServerFacts(**(known | facts)), TINY, "here", takes_tensors=False)
