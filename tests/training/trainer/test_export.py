"""What is exported states the largest view of the training, to each reader of an image processor's files."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
from vtengine_training.trainer.export import export_model
from vtengine_training.trainer.loop import Run

from tests.training.trainer.toy import rewarder
from vtengine.engine.sglang.served import ServedModel
from vtengine.vision.processor import image_processor

FLAT, SIZED = "preprocessor_config.json", "processor_config.json"
OLD = {"min_pixels": 3136, "max_pixels": 12544}
NEW = {"size": {"shortest_edge": 3136, "longest_edge": 12544}}
KIND = {"image_processor_type": "Qwen2VLImageProcessor"}
LEGACY = {"processor_class": "Qwen2_5_VLProcessor"}
MAX_PIXELS = 7840


@pytest.fixture
def export(make_config, tiny_folder, tmp_path):
    """export(files, max_pixels): (folder of a model with these processor files, the folder that is exported)"""

    def go(files, max_pixels):
        source, written = tmp_path / "source", tmp_path / "written"
        shutil.copytree(tiny_folder, source)
        (source / FLAT).unlink()
        for name, config in files.items():
            (source / name).write_text(json.dumps(config))
        changes = {} if max_pixels is None else {"max_pixels": max_pixels}
        one = Run(make_config(model=str(source), **changes), rewarder())
        export_model(one.parts.model, one.parts, written)
        asyncio.run(one.close())
        return source, written

    return go


@pytest.mark.parametrize(
    "files",
    [
        {FLAT: OLD | KIND},
        {FLAT: NEW | KIND},
        {FLAT: OLD | NEW | KIND, SIZED: LEGACY},
        {SIZED: LEGACY | {"image_processor": NEW | KIND}},
        {FLAT: OLD | KIND, SIZED: LEGACY | {"image_processor": NEW | KIND}},
        {FLAT: KIND},
        {},
        {SIZED: LEGACY},
    ],
)
def test_every_reader_sees_the_views_of_the_training(export, files) -> None:
    _, written = export(files, MAX_PIXELS)
    assert image_processor(written).limits.max_pixels == MAX_PIXELS
    served = ServedModel.from_folder(written)
    assert (served.min_pixels, served.max_pixels) == (3136, MAX_PIXELS)
    assert SIZED not in files or (written / SIZED).read_text().count("max_pixels") == (
        "image_processor" in files[SIZED]
    )
    if any("Qwen2VLImageProcessor" in json.dumps(config) for config in files.values()):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.Qwen2VLImageProcessor.from_pretrained(written)
        assert dict(theirs.size)["longest_edge"] == MAX_PIXELS


@pytest.mark.parametrize("max_pixels", [None, 12544])
def test_files_that_say_so_already_are_copied(export, max_pixels) -> None:
    source, written = export({FLAT: NEW | KIND}, max_pixels)
    assert (written / FLAT).read_bytes() == (source / FLAT).read_bytes()


def test_where_both_files_say_something_the_nested_one_counts_as_for_transformers(export) -> None:
    source, _ = export({FLAT: OLD | KIND, SIZED: {"image_processor": {"max_pixels": 6272} | KIND}}, MAX_PIXELS)
    assert image_processor(source).limits.max_pixels == ServedModel.from_folder(source).max_pixels == 6272
    transformers = pytest.importorskip("transformers")
    assert dict(transformers.Qwen2VLImageProcessor.from_pretrained(source).size)["longest_edge"] == 6272
