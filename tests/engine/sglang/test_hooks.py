"""Our plugin for SGLang without SGLang: what it registers, and that its image processor makes our pixels."""

from __future__ import annotations

import importlib
import io
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from vtengine_kernels.patchify import Target, patchify

from vtengine.engine.sglang import hooks, inprocess
from vtengine.engine.sglang.hooked_processor import load_with_pillow, preprocess
from vtengine.engine.sglang.http import hooks_of

REPO = Path(__file__).resolve().parents[3]
OURS = Qwen2VLImageProcessor(min_pixels=784, max_pixels=62720)


@pytest.fixture
def registered(monkeypatch):
    """What `register` does with VTENGINE_SGLANG_HOOKS set: (target, hook, kind) of each call."""
    calls = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType = SimpleNamespace(AFTER="after", AROUND="around")
    module.HookRegistry = SimpleNamespace(register=lambda *call: calls.append(call))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(value):
        monkeypatch.setenv(hooks.VARIABLE, value)
        hooks.register()
        return calls

    return run


def photo(width, height, kind="PNG"):
    pixels = np.random.default_rng(width).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, kind)
    return Image.open(buffer)


def test_the_entry_point_is_declared():
    points = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]
    module, function = points[hooks.PLUGINS][hooks.PLUGIN].split(":")
    assert getattr(importlib.import_module(module), function) is hooks.register


def test_nothing_is_registered_by_default(registered):
    assert registered("") == []


def test_what_is_registered(registered):
    targets = [target for target, _, _ in registered("flush, patchify")]
    assert [target.rsplit(".", 1)[1] for target in targets] == [
        "get_internal_state",
        "flush_cache",
        "load_image",
        "preprocess",
    ]
    with pytest.raises(ValueError, match=r"VTENGINE_SGLANG_HOOKS = .*flsh.*flush, patchify"):
        registered("flsh")


def test_the_server_says_which_are_at_work(registered):
    (_, report, _), *_ = registered("flush")
    state = SimpleNamespace(internal_state={})
    report(state, None)
    assert hooks_of([state.internal_state]) == ("flush",)
    assert hooks_of([state.internal_state, {}]) == () == hooks_of(None) == hooks_of([])


@pytest.mark.parametrize("module", hooks.FEATURE_CACHES)
def test_flushing_empties_the_features_wherever_they_are(monkeypatch, module):
    cache = {"image": 1}
    for name in hooks.FEATURE_CACHES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[module].embedding_cache = cache
    hooks.clear_features(False)
    assert cache
    hooks.clear_features(True)
    assert not cache
    del sys.modules[module].embedding_cache
    with pytest.raises(RuntimeError, match="elsewhere"):
        hooks.clear_features(True)


@pytest.mark.parametrize(("width", "height"), [(112, 84), (301, 222), (30, 500), (20, 20), (640, 480)])
def test_pixels_are_ours_and_near_theirs(width, height):
    picture = photo(width, height)
    ours = preprocess(fail, OURS, [picture], return_tensors="pt")
    theirs = OURS.preprocess([picture], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    _, rows, columns = ours["image_grid_thw"][0].tolist()
    (own,) = patchify(np.asarray(picture), [Target(rows * 14, columns * 14)], layout="full")
    assert torch.equal(ours["pixel_values"], own)
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    # their resize rounds otherwise: a few levels of 255, at most
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 4 / 255 / 0.26


def test_several_images_are_one_tensor():
    pictures = [photo(112, 84), photo(56, 56)]
    both = preprocess(fail, OURS, pictures)
    assert both["image_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4]] and both["pixel_values"].shape == (64, 1176)


def test_what_is_not_ours_goes_the_old_way():
    theirs = lambda processor, images, **options: "theirs"  # noqa: E731
    assert preprocess(theirs, OURS, [np.zeros((28, 28, 3))]) == "theirs"
    assert preprocess(theirs, OURS, [photo(56, 56)], do_resize=False) == "theirs"
    assert preprocess(theirs, Qwen2VLImageProcessor(patch_size=16), [photo(56, 56)]) == "theirs"


def test_jpegs_are_never_decoded_by_the_gpu():
    assert load_with_pillow(lambda image, gpu: (image, gpu), b"jpeg", True) == (b"jpeg", False)


def test_an_engine_in_process_takes_the_hook_where_the_plugin_is_installed(monkeypatch):
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setenv(hooks.VARIABLE, "patchify")
    monkeypatch.setattr(inprocess, "entry_points", lambda group: [])
    assert not inprocess.ask_for_flush()
    monkeypatch.setattr(inprocess, "entry_points", lambda group: [SimpleNamespace(name="vtengine")])
    assert inprocess.ask_for_flush() and hooks.chosen_hooks() == ("patchify", "flush")
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert not inprocess.ask_for_flush()


def fail(*_, **__):
    raise AssertionError("their image processor ran")
