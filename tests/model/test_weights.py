"""Checkpoints: to transformers and back, every fault named, updates in place, nothing half written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtengine.model import (
    Checkpoint,
    ModelLoadError,
    PackedCausal,
    Qwen2_5_VL,
    checkpoint_name,
    hf_tensors,
    load_model,
    load_rows,
    load_tensors,
    save_model,
    weights,
)


def same(a, b):
    left, right = hf_tensors(a), hf_tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def folder(small_model, tmp_path):
    save_model(small_model, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_to_transformers_and_back(tied, small_config, build, tmp_path, relative_error):
    transformers = pytest.importorskip("transformers")
    model = build(dataclasses.replace(small_config, tie_word_embeddings=tied), 8)
    save_model(model, tmp_path / "ours")
    theirs, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        hidden = model.decode(model.embed(ids[0]), torch.arange(5).expand(3, 5), PackedCausal([0, 5]))
        assert relative_error(model.logits(hidden), theirs.eval()(input_ids=ids).logits[0]) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="500KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    back = load_model(tmp_path / "theirs")
    assert back.config == model.config
    assert same(back, model)
    assert not back.training


def test_names_are_those_of_released_checkpoints(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert {
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.attn.qkv.bias",
        "visual.blocks.3.mlp.up_proj.bias",
        "visual.merger.mlp.2.weight",
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.k_proj.bias",
        "model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight",
    } <= names
    assert not any("fused" in name or "gate_up" in name or name.startswith("lm_head") for name in names)
    assert load_file(folder / "model.safetensors")["visual.patch_embed.proj.weight"].shape == (128, 3, 2, 14, 14)


def test_shards(small_model, tmp_path):
    save_model(small_model, tmp_path, shard_bytes=300_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == hf_tensors(small_model).keys()
    assert not (tmp_path / "model.safetensors").exists()
    assert same(load_model(tmp_path), small_model)
    save_model(small_model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_model(tmp_path), small_model)


def test_other_files_stay(small_model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    save_model(small_model, tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "adapter.safetensors").exists()
    load_model(tmp_path)


def test_others_may_read_a_saved_checkpoint(folder):
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()} == {0o644}


def test_dtypes(folder, small_model, tmp_path):
    half = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "half").dtype == torch.float32


def test_new_names_load(folder, small_model, new_name):
    def rename(tensors):
        for name in list(tensors):
            assert checkpoint_name(new_name(name)) == name
            tensors[new_name(name)] = tensors.pop(name)

    rewrite(folder, rename)
    assert same(load_model(folder), small_model)


def test_missing_extra_and_misshapen_tensors_are_all_named(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["visual.blocks.2.attn.proj.bias"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(128, 64)

    rewrite(folder, spoil)
    with pytest.raises(ModelLoadError) as error:
        load_model(folder)
    message = str(error.value)
    assert "2 missing: visual.blocks.2.attn.proj.bias, model.norm.weight" in message
    assert "1 unexpected: model.layers.9.mlp.up_proj.weight" in message
    assert "model.layers.1.self_attn.q_proj.weight is [128, 64], config says [128, 128]" in message
    assert "Use the config.json that belongs" in message


def test_long_lists_of_names_are_cut(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:60]])
    with pytest.raises(ModelLoadError, match=r"60 missing: .* and 52 more"):
        load_model(folder)


def test_tied_head_in_the_file(folder, small_model):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert same(load_model(folder), small_model)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ModelLoadError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


def test_missing_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelLoadError, match=r"1 missing: lm_head.weight"):
        load_model(folder)


def test_folders_without_a_model(tmp_path, folder):
    with pytest.raises(ModelLoadError, match="not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"needs its config\.json"):
        load_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="download the weights"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelLoadError, match="pickled weights are not read"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number(folder, value, stored):
    def spoil(tensors):
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})
        tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[-1] = value

    rewrite(folder, spoil)
    found = r"model\.safetensors: model\.layers\.1\.mlp\.down_proj\.weight has 1 of \d+ values .* the checkpoint before"
    with pytest.raises(ModelLoadError, match=found):
        load_model(folder, dtype=torch.bfloat16)


def test_the_largest_finite_values_are_numbers(folder, small_model):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.finfo(torch.float32).max))
    assert (load_model(folder).norm.weight == torch.finfo(torch.float32).max).all()


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": 3}', "not a safetensors index"),
        ('{"weight_map": {"a": 3, "b": "x"}}', "not a safetensors index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside the folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "shards named by .* are missing: model-00001"),
    ],
)
def test_bad_index(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelLoadError, match=message):
        load_model(folder)


def in_pieces(folder, size, dtype=torch.float32):
    """The model of `size` processes that each read their own rows of every parameter."""
    checkpoint = Checkpoint.open(folder)
    model = Qwen2_5_VL(checkpoint.config).to(dtype)
    for rank in range(size):

        def own(parameter, rank=rank):
            rows = -(-len(parameter) // size)
            first = min(rank * rows, len(parameter))
            return parameter.data[first : first + rows], first

        load_rows(model, checkpoint, dtype, own)
    return model


@pytest.mark.parametrize(("size", "tied"), [(1, True), (2, False), (3, True), (20, False)])
def test_rows_of_any_cut_make_the_same_model(size, tied, small_config, build, tmp_path):
    """Cuts through q, k, v and gate, up, which are one matrix here; some processes have none of a short one."""
    save_model(build(dataclasses.replace(small_config, tie_word_embeddings=tied), 4), tmp_path, shard_bytes=300_000)
    assert same(in_pieces(tmp_path, size), load_model(tmp_path))


def test_rows_are_rounded_as_the_whole_is(folder):
    half = load_model(folder, dtype=torch.bfloat16)
    assert same(in_pieces(folder, 3, torch.bfloat16), half)
    model = load_model(folder)
    load_rows(model, Checkpoint.open(folder), torch.bfloat16, lambda parameter: (parameter.data, 0))
    assert same(model, half.float())


def _damage(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_damage("model.norm.weight", float("nan")), r"model\.norm\.weight has 1 of 42 values that are NaN"),
        (_damage("visual.patch_embed.proj.weight", float("inf")), r"patch_embed\.proj\.weight has 1 of"),
        (lambda x: x.update({"model.norm.weight": x["model.norm.weight"].to(torch.float8_e4m3fn)}), "quantised"),
        (lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 1}), r"lm_head\.weight differs"),
        (lambda x: x.update({"lm_head.weight": torch.zeros(3)}), r"lm_head\.weight differs"),
        (lambda x: x.pop("model.norm.weight"), "1 missing"),
    ],
    ids=["NaN", "infinity", "quantised", "head", "short head", "missing"],
)
def test_faults_are_found_by_whoever_has_the_rows(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        in_pieces(folder, 3)


def test_a_file_that_was_cut_short_is_named(folder):
    path = folder / "model.safetensors"
    checkpoint = Checkpoint.open(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: damaged .*download it again"):
        checkpoint.rows("model.norm.weight", 0, 1)


def test_update_in_place(small_config, build):
    model, other = build(small_config, 1), build(small_config, 2)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_tensors(model, hf_tensors(other))
    assert same(model, other)
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_partial_update(small_config, build):
    model, other = build(small_config, 1), build(small_config, 2)
    part = {name: tensor for name, tensor in hf_tensors(other).items() if "self_attn" in name}
    with pytest.raises(ModelLoadError, match="missing"):
        load_tensors(model, part)
    assert same(model, build(small_config, 1))
    load_tensors(model, part, partial=True)
    now = hf_tensors(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in part.items())
    assert not same(model, other)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (torch.zeros(5), r"model\.norm\.weight is \[5\]"),
        (torch.int8, r"model\.norm\.weight is torch\.int8"),
        (torch.float8_e4m3fn, r"model\.norm\.weight is torch\.float8_e4m3fn"),
    ],
    ids=["shape", "quantised", "8 bits"],
)
def test_a_faulty_update_changes_nothing(norm, message, small_config, build):
    model = build(small_config, 1)
    update = dict(hf_tensors(build(small_config, 2)))
    name = "model.norm.weight"
    update[name] = norm if isinstance(norm, torch.Tensor) else update[name].to(norm)
    with pytest.raises(ModelLoadError, match=message):
        load_tensors(model, update)
    assert same(model, build(small_config, 1))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_update_of_a_tied_model_may_hold_the_head(small_config, build, streamed):
    model, other = build(small_config, 1), build(small_config, 2)
    update = dict(hf_tensors(other))
    update["lm_head.weight"] = update["model.embed_tokens.weight"].clone()
    load_tensors(model, iter(update.items()) if streamed else update)
    assert same(model, other)
    update["lm_head.weight"][0, 0] += 1
    before = model.norm.weight.clone()
    update["model.norm.weight"] = before + 1
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight differs"):
        load_tensors(model, iter(update.items()) if streamed else update)
    assert streamed or torch.equal(model.norm.weight, before)


def test_a_failed_save_leaves_the_old_files(folder, small_model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(small_model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("name", "shape"), [("model.norm.weight", (1,)), ("model.norm.bias", (128,))])
def test_a_streamed_update_is_checked_too(small_config, build, name, shape):
    """copy_ alone would broadcast a tensor of one value over the whole parameter."""
    with pytest.raises(ModelLoadError, match=name):
        load_tensors(build(small_config, 1), iter([(name, torch.zeros(shape))]), partial=True)


def test_a_streamed_update_must_be_complete(small_config, build):
    model = build(small_config, 1)
    tensors = list(hf_tensors(build(small_config, 2)).items())
    with pytest.raises(ModelLoadError, match=r"1 tensors missing: model\.norm\.weight"):
        load_tensors(model, iter(tensors[:-1]))
    load_tensors(model, iter(tensors))
    assert same(model, build(small_config, 2))
