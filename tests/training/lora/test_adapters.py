"""Adapters on the model: what is trained, what comes out merged, and whether others read what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from vtengine_training.lora.adapters import Adapters, save_adapter
from vtengine_training.lora.config import LoraConfig
from vtengine_training.lora.targets import find_targets

from tests.tiny_model import byte_encoder
from tests.training.trainer.toy_model import tiny_config
from vtengine.config import ConfigError, build
from vtengine.model import PackedCausal, Qwen2_5_VL, load_model, mrope_positions, save_model

pytest.importorskip("peft")

GRIDS = [(1, 4, 6), (1, 2, 4)]
EVERYTHING = LoraConfig(rank=3, alpha=5, vision=True, merger=True, targets=("proj", "qkv", "q_proj", "k_proj", "v_proj",
    "o_proj", "gate_proj", "up_proj", "down_proj", "0", "2", "lm_head"))  # fmt: skip
TIED = tiny_config(byte_encoder())
UNTIED = replace(TIED, tie_word_embeddings=False)


def fresh(config=UNTIED) -> Qwen2_5_VL:
    return Qwen2_5_VL.build(config, 3).eval()


def adapted(lora: LoraConfig, config=UNTIED, dtype=torch.float32) -> Adapters:
    """With adapters that have an effect."""
    adapters = Adapters.put_into(fresh(config).to(dtype), lora)
    adapters.begin(1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return adapters


def prompt() -> tuple[list[int], torch.Tensor]:
    """Two images between their markers, and text. (ids, pixels)."""
    ids = [5, 6, 7]
    for _, height, width in GRIDS:
        ids += [UNTIED.vision_start_token_id, *[UNTIED.image_token_id] * (height * width // 4)]
        ids += [UNTIED.vision_end_token_id, 9, 10]
    pixels = torch.randn(sum(h * w for _, h, w in GRIDS), 1176, generator=torch.Generator().manual_seed(0))
    return ids, pixels


def logits(model: Qwen2_5_VL) -> torch.Tensor:
    ids, pixels = prompt()
    features = model.visual(pixels.to(model.dtype), GRIDS)
    positions = mrope_positions(ids, GRIDS, image_token_id=model.config.image_token_id)[0]
    hidden = model.decode(model.embed(torch.tensor(ids), features), positions, PackedCausal([0, len(ids)]))
    return model.logits(hidden)


def test_linear_layers_of_the_language_model_by_default() -> None:
    names = [target.name for target in find_targets(UNTIED, LoraConfig(rank=2))]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts]
    wide = [target.name for target in find_targets(UNTIED, LoraConfig(rank=2, vision=True, merger=True))]
    assert set(wide) - set(names) == {
        *(f"visual.blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")),
        *("visual.blocks.0.mlp.down_proj", "visual.merger.mlp.0", "visual.merger.mlp.2"),
    }


def test_names_may_be_ends_or_whole_as_either_transformers_has_them() -> None:
    for name in ("layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj",
                 "model.language_model.layers.1.self_attn.v_proj"):  # fmt: skip
        (target,) = find_targets(UNTIED, LoraConfig(rank=2, targets=(name,)))
        assert (target.path, target.begin, target.end) == ("layers.1.attn.qkv", 48, 64)
    both = find_targets(UNTIED, LoraConfig(rank=2, targets=("lm_head", "gate_proj")))
    assert [target.name for target in both][-1] == "lm_head" and len(both) == 3


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": ("q_porj",)}, "no linear layer is called 'q_porj'; did you mean q_proj"),
        (
            {"targets": ("q_proj", "nothing")},
            "'nothing'; known: qkv, proj, gate_proj, up_proj, down_proj, 0, 2, q_proj",
        ),
        ({"targets": ("attn.qkv",)}, "'attn.qkv' is in the vision tower, which stays frozen; set lora.vision = true"),
        ({"targets": ("mlp.2",), "vision": True}, "set lora.merger = true"),
        ({"targets": ("roj",)}, "no linear layer is called 'roj'"),
        ({"targets": ("lm_head",), "dropout": 0.1}, "lora.dropout = 0.1: the loss takes the head's adapter whole"),
    ],
)
def test_targets_that_are_not_there(lora, words) -> None:
    with pytest.raises(ValueError, match=words):
        Adapters.put_into(fresh(), LoraConfig(rank=2, **lora))


def test_a_tied_head_takes_no_adapter() -> None:
    with pytest.raises(ValueError, match="head is its embedding"):
        find_targets(TIED, LoraConfig(rank=2, targets=("lm_head",)))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rank": -1}, "rank = -1: must be 0 or more"),
        ({"alpha": 0}, "alpha = 0: must be 1 or more"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"target": ["q_proj"]}, "target: unknown key; did you mean targets?"),
    ],
)
def test_sections_that_cannot_be(section, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build(LoraConfig, section)


def test_fresh_adapters_change_nothing_and_are_all_that_learns() -> None:
    expected = logits(fresh())
    adapters = Adapters.put_into(fresh(), LoraConfig(rank=3))
    adapters.begin(1)
    found = logits(adapters.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.square().mean().backward()
    learning = {name for name, parameter in adapters.model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, p in adapters.model.named_parameters() if "lora_" in name and p.requires_grad}
    assert len(learning) == 2 * 14


def test_begins_the_same_whatever_was_drawn_before() -> None:
    first, second = (Adapters.put_into(fresh(), LoraConfig(rank=3)) for _ in range(2))
    torch.rand(7)
    first.begin(1)
    second.begin(1)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])
        assert bool(tensor.any()) == ("lora_A" in name)


SOME = [
    EVERYTHING,
    *(LoraConfig(rank=2, targets=names) for names in (("k_proj",), ("q_proj", "v_proj", "up_proj"))),
    LoraConfig(rank=2, targets=("layers.1.mlp.gate_proj", "lm_head")),
]


@pytest.mark.parametrize("lora", SOME, ids=lambda lora: "-".join(lora.targets[:2]))
def test_merged_is_adapted_and_without_them_it_is_the_model_before(lora) -> None:
    adapters = adapted(lora)
    learning = logits(adapters.model)
    assert learning.requires_grad
    with torch.inference_mode():
        generating, merged = logits(adapters.model), logits(adapters.merged_model())
        with adapters.switch.off():
            before = logits(adapters.model)
        base = logits(fresh())
    assert torch.equal(before, base)
    assert (generating - base).abs().max() > 0.1
    torch.testing.assert_close(generating, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learning.detach(), generating, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_merged_weights() -> None:
    """dA = B' dW scale and dB = dW A' scale, with dW of a plain model whose weights are the merged ones."""
    adapters = adapted(EVERYTHING)
    logits(adapters.model).square().mean().backward()
    plain = adapters.merged_model().requires_grad_(True)
    logits(plain).square().mean().backward()
    for target, layer in zip(adapters.targets, adapters.layers().values(), strict=True):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        gradient = plain.get_parameter(f"{target.path}.weight").grad[target.begin : target.end]
        scale = 5 / 3
        torch.testing.assert_close(down.grad, scale * up.detach().t() @ gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(up.grad, scale * gradient @ down.detach().t(), rtol=1e-3, atol=1e-6)


def test_bfloat16_adapters_are_merged_in_float32_and_rounded_once() -> None:
    adapters = adapted(LoraConfig(rank=3), dtype=torch.bfloat16)
    assert {p.dtype for p in adapters.model.parameters()} == {torch.bfloat16}
    (name, merged), *_ = adapters.merged()
    target, layer = adapters.targets[0], next(iter(adapters.layers().values()))
    base = adapters.model.get_parameter(f"{target.path}.weight")[target.begin : target.end]
    factors = [getattr(layer, kind)["default"].weight.detach() for kind in ("lora_B", "lora_A")]
    assert name == "model.layers.0.self_attn.q_proj.weight"
    exact = base.double() + 32 / 3 * factors[0].double() @ factors[1].double()
    assert ((merged.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()  # half a unit in the last place
    with torch.inference_mode():
        assert torch.isfinite(logits(adapters.model)).all()


def test_dropout_only_where_gradients_are_formed() -> None:
    adapters = adapted(LoraConfig(rank=3, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(logits(adapters.model), logits(adapters.model))
    assert not torch.equal(logits(adapters.model), logits(adapters.model))


def test_transformers_and_peft_read_what_is_written(tmp_path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    adapters = adapted(EVERYTHING)
    save_model(fresh(), tmp_path / "base")
    save_model(adapters.merged_model(), tmp_path / "merged")
    save_adapter(adapters.tensors(), adapters, tmp_path / "base", tmp_path / "adapter")
    with torch.inference_mode():
        expected = logits(adapters.model)
        torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    family = transformers.Qwen2_5_VLForConditionalGeneration
    merged = family.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    base = family.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids, pixels = prompt()
    kinds = torch.tensor([[int(token == UNTIED.image_token_id) for token in ids]])
    given = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_grid_thw": torch.tensor(GRIDS)}
    for theirs in (merged, with_adapter):
        with torch.inference_mode():
            found = theirs(**given, mm_token_type_ids=kinds).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 5, "LORA")
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(adapters.targets)


def test_without_peft_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora.rank = 2: peft cannot be imported \(.*\); .*'vtengine\[lora\]'"):
        Adapters.put_into(fresh(), LoraConfig(rank=2))
