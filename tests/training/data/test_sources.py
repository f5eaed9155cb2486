"""Parquet files and saved datasets: columns by name, images kept encoded, every kind of bad row counted."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from vtengine_training.data.config import DataConfig, GlanceData, SourceConfig
from vtengine_training.data.examples import read_dataset
from vtengine_training.data.load import load_examples

from vtengine.protocol.profile import load_profile
from vtengine.protocol.reply import parse_reply
from vtengine.protocol.tools import CROP
from vtengine.vision.errors import ImageError
from vtengine.vision.source import read_image_source

pyarrow = pytest.importorskip("pyarrow")

VISIONTHINK = {
    "id": "doc_id",
    "image": "images",
    "question": "problem",
    "answer": "solution",
    "needs_high": "info.use_tool",
}


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parquet(path, rows, row_group_size=None):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def published(number: int, **changes):
    """A row with the columns of the published VisionThink data."""
    row = {
        "images": {"bytes": png(number), "path": None},
        "doc_id": f"doc-{number}",
        "problem": f"<image>\nWhat is number {number}?",
        "solution": str(number),
        "info": {"id": number, "tgt_height": 56, "tgt_width": 84, "use_tool": number % 2 == 1},
        "original_answer": "-",
        "data_source": "open_source",
    }
    return row | changes


def read(path, folder, **options):
    options = {"columns": VISIONTHINK, "remove": ("<image>",)} | options
    return read_dataset([path], SourceConfig(**options), folder / "images")


def test_the_published_columns_by_config(tmp_path) -> None:
    path = parquet(tmp_path / "a.parquet", [published(n) for n in range(3)], row_group_size=2)
    found = read(path, tmp_path)
    assert [one.id for one in found.examples] == ["doc-0", "doc-1", "doc-2"]
    one = found.examples[1]
    assert one.question == "What is number 1?" and one.answers == ("1",)
    assert one.fields["needs_high"] is True and one.fields["info"]["tgt_height"] == 56
    assert {"images", "problem", "solution", "doc_id"}.isdisjoint(one.fields)
    assert (one.root / one.image).read_bytes() == png(1) and not found.rejected


def test_an_image_of_many_rows_is_kept_once(tmp_path) -> None:
    rows = [published(n, images={"bytes": png(7), "path": None}) for n in range(5)]
    found = read(parquet(tmp_path / "a.parquet", rows), tmp_path)
    assert len({one.image for one in found.examples}) == 1
    assert len([path for path in (tmp_path / "images").rglob("*") if path.is_file()]) == 1
    before = next((tmp_path / "images").rglob("*.png")).stat().st_mtime_ns
    read(tmp_path / "a.parquet", tmp_path)
    assert next((tmp_path / "images").rglob("*.png")).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("image", "works"),
    [(png(), True), ([{"bytes": png(), "path": "x.png"}], True), ({"bytes": None, "path": "there.png"}, True)],
    ids=["bytes", "a list of one", "a path in the struct"],
)
def test_images_in_other_forms(tmp_path, image, works) -> None:
    (tmp_path / "there.png").write_bytes(png())
    found = read(parquet(tmp_path / "a.parquet", [published(0, images=image)]), tmp_path)
    (one,) = found.examples
    assert (one.root / one.image).read_bytes() == png()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": None}, "image_missing"),
        ({"images": {"bytes": None, "path": None}}, "image_missing"),
        ({"images": {"bytes": b"", "path": None}}, "image_empty"),
        ({"problem": None}, "question_missing"),
        ({"problem": "<image>"}, "question_missing"),
        ({"solution": None}, "answer_missing"),
        ({"doc_id": "doc-0"}, "id_duplicate"),
    ],
)
def test_bad_rows_are_counted_by_reason(tmp_path, changes, code) -> None:
    rows = [published(0), published(1, **changes), published(2)]
    found = read(parquet(tmp_path / "a.parquet", rows), tmp_path)
    assert found.rejected == {code: 1}
    assert [one.id for one in found.examples] == ["doc-0", "doc-2"]


def test_several_images_in_a_row_are_refused(tmp_path) -> None:
    struct = {"bytes": png(), "path": None}
    rows = [published(0, images=[struct]), published(1, images=[struct, struct]), published(2, images=[])]
    assert read(parquet(tmp_path / "a.parquet", rows), tmp_path).rejected == {
        "image_not_single": 1,
        "image_missing": 1,
    }


def test_values_that_json_cannot_hold_are_not_carried(tmp_path) -> None:
    rows = [published(0, weight=float("nan"), blob=b"x", score=0.5)]
    (one,) = read(parquet(tmp_path / "a.parquet", rows), tmp_path).examples
    assert "weight" not in one.fields and "blob" not in one.fields and one.fields["score"] == 0.5


def test_folder_of_shards_and_max_rows(tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(2):
        parquet(folder / f"train-0000{shard}.parquet", [published(2 * shard + n) for n in range(2)])
    assert [one.id for one in read(folder, tmp_path).examples] == [f"doc-{n}" for n in range(4)]
    assert len(read(folder, tmp_path, max_rows=3)) == 3


def test_a_mistyped_column_names_those_there_are(tmp_path) -> None:
    path = parquet(tmp_path / "a.parquet", [published(0)])
    with pytest.raises(ValueError, match=r"columns.answer = 'solutoin'.* solution"):
        read(path, tmp_path, columns=VISIONTHINK | {"answer": "solutoin"})
    with pytest.raises(ValueError, match="no column answer"):
        read(path, tmp_path, columns={"image": "images", "question": "problem"})


def test_what_is_no_parquet(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="is no parquet file"):
        read(tmp_path / "a.parquet", tmp_path)
    with pytest.raises(OSError, match="no such file"):
        read(tmp_path / "b.parquet", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a saved dataset nor parquet"):
        read(tmp_path / "empty", tmp_path)


def test_damaged_in_the_middle(tmp_path) -> None:
    path = parquet(tmp_path / "a.parquet", [published(n) for n in range(40)], row_group_size=10)
    held = bytearray(path.read_bytes())
    middle = len(held) // 2
    held[middle : middle + 4000] = bytes(4000)
    path.write_bytes(held)
    try:
        found = read(path, tmp_path)
    except ValueError as error:
        assert "damaged" in str(error)
    else:  # the zeros fell into the pixels of an image: found out when that image is opened
        assert len(found) + sum(found.rejected.values()) == 40


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch) -> None:
    path = parquet(tmp_path / "a.parquet", [published(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"vtengine\[data\]"):
        read(path, tmp_path)


def test_saved_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "images": datasets.Image(),
            "doc_id": datasets.Value("string"),
            "problem": datasets.Value("string"),
            "solution": datasets.Value("string"),
            "info": {"use_tool": datasets.Value("bool")},
        }
    )
    rows = [{key: published(n)[key] for key in features} for n in range(3)]
    rows = [row | {"info": {"use_tool": row["info"]["use_tool"]}} for row in rows]
    rows[2]["images"] = None
    whole = datasets.Dataset.from_list(rows, features=features)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "splits"))
    found = read(tmp_path / "one", tmp_path)
    assert found.rejected == {"image_missing": 1}
    assert [(one.root / one.image).read_bytes() for one in found.examples] == [png(0), png(1)]
    assert found.fingerprint == read(tmp_path / "splits" / "train", tmp_path).fingerprint
    with pytest.raises(ValueError, match=r"splits train; name one"):
        read(tmp_path / "splits", tmp_path)
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a saved dataset"):
        read(tmp_path / "one", tmp_path)


def test_columns_of_jsonl(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"img": "a.png", "q": "<image> what?", "a": {"text": "x"}}, {"img": "a.png", "q": "what?", "a": {}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"image": "img", "question": "q", "answer": "a.text"}
    found = read_dataset([path], SourceConfig(columns=columns, remove=("<image>",)))
    assert found.rejected == {"answer_missing": 1}
    assert found.examples[0].question == "what?" and found.examples[0].answers == ("x",)


def test_a_mapped_column_that_no_row_has_is_an_error(tmp_path) -> None:
    """A mistyped needs_high would else be missed without a word, with the column of that name hidden by the mapping."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "?", "answer": "x", "needs_high": 1, "of": {"b": 2}}))
    with pytest.raises(ValueError, match=r"data.columns.needs_high = 'needs_hihg': no row has it; .* image, of, que"):
        read_dataset([path], SourceConfig(columns={"needs_high": "needs_hihg"}))
    with pytest.raises(ValueError, match=r"validation.columns.id = 'uid': no row"):
        read_dataset([path], SourceConfig(columns={"id": "uid", "b": "of.b"}), section="validation")
    with pytest.raises(ValueError, match=r"data.columns.needs_high = 'info.use_tol': no row"):
        columns = VISIONTHINK | {"needs_high": "info.use_tol"}
        read(parquet(tmp_path / "a.parquet", [published(0)]), tmp_path, columns=columns)


def test_a_label_that_is_no_truth_value_is_not_passed_over(tmp_path) -> None:
    """A cold start would teach such a row both ways, as one without a label."""
    path, labels = tmp_path / "a.jsonl", ["true", "1", 0.5, [], True, 0, 1.0, None]
    rows = [{"image": "a.png", "question": "?", "answer": "x", "needs_high": label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_dataset([path])
    assert found.rejected == {"needs_high_wrong_type": 4}
    assert [one.fields["needs_high"] for one in found.examples] == [True, 0, 1.0, None]


def test_what_is_wrong_with_the_validation_set_is_said_of_it(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^validation.files: no usable example"):
        load_examples(SourceConfig(files=(str(tmp_path / "empty.jsonl"),)), tmp_path, "validation")
    source = SourceConfig(files=(str(labelled(tmp_path, ["a"])),), mix={"b": 1.0})
    with pytest.raises(ValueError, match=r"^validation.mix.b: no example"):
        load_examples(source, tmp_path, "validation")


def labelled(folder, labels):
    rows = [{"image": "a", "question": "?", "answer": "x", "label": label} for label in labels]
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mix(tmp_path) -> None:
    path = labelled(tmp_path, ["low"] * 20 + ["high"] * 6 + ["other"] * 9)

    def counts(shares, seed=0):
        config = DataConfig(files=(str(path),), mix=shares)
        found = load_examples(config, tmp_path, seed=seed)
        kept = [one.fields["label"] for one in found.examples]
        return {label: kept.count(label) for label in set(kept)}, found

    assert counts({"low": 0.5, "high": 0.5})[0] == {"low": 6, "high": 6}
    assert counts({"low": 3, "high": 1})[0] == {"low": 18, "high": 6}
    assert counts({"high": 1.0})[0] == {"high": 6}
    first, again, other = (counts({"low": 1, "high": 1}, seed)[1] for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    places = [int(one.id.removeprefix("line-")) for one in first.examples]
    assert places == sorted(places)
    with pytest.raises(
        ValueError, match=r"data.mix.hihg: no example has label = hihg; there are high \(6\), low \(20\)"
    ):
        counts({"hihg": 1.0})


def test_truth_values_are_labels_too(tmp_path) -> None:
    path = labelled(tmp_path, [True, False, False])
    config = DataConfig(files=(str(path),), mix={"true": 1, "false": 1})
    assert len(load_examples(config, tmp_path)) == 2


def test_left_out_rows_are_said_once(tmp_path, caplog) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a", "question": "?", "answer": "x"}\n{"question": "?"}\nno json\n')
    load_examples(DataConfig(files=(str(path),)), tmp_path)
    assert "2 rows cannot be used: image_missing 1, line_not_json 1" in caplog.text


def test_generated_questions_are_written_once(tmp_path) -> None:
    config = SourceConfig(glance=GlanceData(seed=5, count=3))
    first = load_examples(config, tmp_path, "validation")
    stamp = (tmp_path / "questions-validation-5-3" / "questions.jsonl").stat().st_mtime_ns
    assert load_examples(config, tmp_path, "validation").fingerprint == first.fingerprint
    assert (tmp_path / "questions-validation-5-3" / "questions.jsonl").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".*"))


def test_generated_questions_that_teach_to_crop(tmp_path) -> None:
    """Only where the low view does not do; whole replies, in the profile's words, with a box that can be cropped."""
    crops = load_examples(SourceConfig(glance=GlanceData(seed=5, count=30, crops=True)), tmp_path)
    plain = load_examples(SourceConfig(glance=GlanceData(seed=5, count=30)), tmp_path)
    offered = load_profile("glance-crop").offered
    for one, other in zip(crops.examples, plain.examples, strict=True):
        assert (one.id, one.question, one.answers) == (other.id, other.question, other.answers)
        assert ("replies" in one.fields) == one.fields["needs_high"] and "replies" not in other.fields
        if replies := one.fields.get("replies"):
            call, answer = (parse_reply(text, offered) for text in replies)
            assert call.call is not None and call.call.name == CROP and answer.answer == one.answers[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": ()}, "not both"),
        ({"files": ("a",), "glance": GlanceData()}, "not both"),
        ({"files": ("a",), "mix": {"low": 0.0}}, "positive share"),
        ({"files": ("a",), "columns": {"image": "a..b"}}, "must name a column"),
        ({"files": ("a",), "max_rows": 0}, "1 or more"),
        ({"files": ("a",), "remove": ("",)}, "not empty"),
    ],
)
def test_bad_configs(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_images_elsewhere_below_a_root(tmp_path) -> None:
    """Paths begin at the file's folder, and may leave it for another one below the root; what was unpacked stays."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png())
    paths = ["../photos/a.png", str(tmp_path / "photos" / "a.png"), "../../a.png", "Data:image/png;base64,AA=="]
    rows = [{"image": path, "question": "What?", "answer": "1"} for path in paths]
    (tmp_path / "annotations" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(image_root=str(tmp_path))
    found = read_dataset([tmp_path / "annotations" / "rows.jsonl"], source, tmp_path / "images").examples
    assert [one.image for one in found[:3]] == ["photos/a.png", "photos/a.png", "../a.png"]
    assert read_image_source(found[0].image, found[0].root) == png()
    with pytest.raises(ImageError, match="outside the image root"):
        read_image_source(found[2].image, found[2].root)
    assert found[3].image == paths[3]
    (tmp_path / "link").symlink_to(tmp_path)  # a root by another name than the files'
    (linked, *_) = read_dataset(
        [tmp_path / "annotations" / "rows.jsonl"], SourceConfig(image_root=str(tmp_path / "link")), None
    ).examples
    assert linked.image == "photos/a.png" and read_image_source(linked.image, linked.root) == png()
    path = parquet(tmp_path / "annotations" / "a.parquet", [published(0)])
    (stored,) = read(path, tmp_path, image_root=str(tmp_path / "photos")).examples
    assert read_image_source(stored.image, stored.root) == png()
