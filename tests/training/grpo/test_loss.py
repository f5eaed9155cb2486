"""Every objective against the float64 reference: values, and gradients by finite differences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from vtengine_training.grpo.config import PRESETS, LossConfig
from vtengine_training.grpo.loss import Tokens, grpo_loss, importance_weights, kl_estimate, mismatch_figures
from vtengine_training.grpo.weights import token_weights

from tests.training.grpo.reference import reference_loss

GROUPS = [0, 0, 1, 1, 1]
LENGTHS = [3, 1, 5, 2, 4]
LONGEST = 8


def make_sequences(seed=0, gap=0.3):
    rng = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        old = -rng.exponential(1.0, length)
        new = old + gap * rng.normal(size=length)
        made.append(
            {
                "old": old,
                "new": new,
                "frozen": new.copy(),
                "rollout": old + 0.2 * rng.normal(size=length),
                "ref": old + 0.2 * rng.normal(size=length),
                "entropy": rng.uniform(0, 2, length),
                "advantage": rng.normal(),
            }
        )
    return made


def tensors(sequences, config, chosen=None, lengths=None):
    """(logprobs with gradient, Tokens, entropy) of the chosen sequences of a mini-batch."""
    chosen = range(len(sequences)) if chosen is None else chosen
    weights = token_weights(LENGTHS, GROUPS, config.objective.aggregation, LONGEST)

    def joined(name):
        return torch.from_numpy(np.concatenate([sequences[i][name] for i in chosen]))

    def spread(values):
        counts = [LENGTHS[i] for i in chosen]
        return torch.from_numpy(np.repeat(np.asarray(values), counts))

    tokens = Tokens(
        joined("old"),
        joined("rollout"),
        spread([sequences[i]["advantage"] for i in chosen]),
        spread([weights[i] for i in chosen]),
        spread(np.arange(len(chosen))),
        len(chosen),
        joined("ref"),
    )
    return joined("new").requires_grad_(), tokens, joined("entropy")


CONFIGS = [
    *(LossConfig(algorithm=name) for name in PRESETS),
    *(LossConfig(algorithm="grpo", kl_coef=0.3, kl=kind) for kind in ("k1", "k2", "k3")),
    LossConfig(algorithm="dapo", entropy_coef=0.1, kl_coef=0.05),
    LossConfig(algorithm="grpo", aggregation="prompt-mean", clip_low=0.1),
    LossConfig(algorithm="gspo", clip_low=0.05, clip_high=0.1, aggregation="token-mean"),
    LossConfig(algorithm="grpo", old_logprobs="recompute", importance_cap=1.1),
    LossConfig(algorithm="cispo", clip_high=0.1, clip_low=0.2),
    LossConfig(algorithm="grpo", dual_clip=1.1),
    LossConfig(algorithm="gspo", clip_low=0.05, clip_high=0.1, dual_clip=1.02),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.algorithm}-{config.kl}-{config.aggregation}")
def test_values_and_gradients(config) -> None:
    sequences = make_sequences()
    logprobs, tokens, entropy = tensors(sequences, config)
    loss = grpo_loss(logprobs, tokens, config, entropy).total
    assert loss.item() == pytest.approx(reference_loss(sequences, GROUPS, config, LONGEST), rel=1e-12)
    loss.backward()
    step = 1e-6
    found = iter(logprobs.grad.tolist())
    for one in sequences:
        for t in range(len(one["new"])):
            around = []
            for sign in (1, -1):
                one["new"][t] += sign * step
                around.append(reference_loss(sequences, GROUPS, config, LONGEST))
                one["new"][t] -= sign * step
            assert next(found) == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "cut", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[4], [1, 3], [0, 2]], [[i] for i in range(5)]]
)
def test_micro_batches_add_up(name, cut) -> None:
    config = LossConfig(algorithm=name, kl_coef=0.1, entropy_coef=0.01)
    sequences = make_sequences(1)
    whole, tokens, entropy = tensors(sequences, config)
    total = grpo_loss(whole, tokens, config, entropy).total
    total.backward()
    order = [i for part in cut for i in part]
    pieces, gradients = [], []
    for part in cut:
        logprobs, tokens, entropy = tensors(sequences, config, part)
        piece = grpo_loss(logprobs, tokens, config, entropy).total
        piece.backward()
        pieces.append(piece.item())
        gradients.append(logprobs.grad)
    assert sum(pieces) == pytest.approx(total.item(), rel=1e-12)
    starts = dict(zip(range(5), itertools.accumulate([0, *LENGTHS]), strict=False))
    expected = torch.cat([whole.grad[starts[i] : starts[i] + LENGTHS[i]] for i in order])
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-12, atol=1e-15)


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    sequences = make_sequences(gap=0.0)
    gradients = []
    for policy in ("clip", "clipped-weight", "reinforce", "sequence-clip"):
        config = LossConfig(policy=policy, clip_low=0.2, clip_high=0.2)
        logprobs, tokens, entropy = tensors(sequences, config)
        result = grpo_loss(logprobs, tokens, config, entropy)
        result.total.backward()
        assert result.figures["clip_frac"] == 0
        gradients.append(logprobs.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other)


def test_clip_fraction_counts_tokens_whose_gradient_is_gone() -> None:
    config = LossConfig(clip_low=0.2, clip_high=0.2)
    sequences = make_sequences(gap=1.0)
    logprobs, tokens, entropy = tensors(sequences, config)
    result = grpo_loss(logprobs, tokens, config, entropy)
    result.total.backward()
    assert result.figures["clip_frac"] == float((logprobs.grad == 0).sum()) > 0


def test_padding_is_in_no_figure() -> None:
    """A token of weight 0, which ranks without images add, leaves every figure as it was."""
    config = LossConfig(kl_coef=0.1, entropy_coef=0.01)
    logprobs, tokens, entropy = tensors(make_sequences(gap=1.0), config)
    last = torch.zeros(1, dtype=logprobs.dtype)
    padded = replace(
        tokens,
        **{name: torch.cat([getattr(tokens, name), last - 3]) for name in ("old", "rollout", "ref")},
        **{name: torch.cat([getattr(tokens, name), last]) for name in ("advantages", "weights")},
        sequences=torch.cat([tokens.sequences, tokens.sequences.new_tensor([tokens.num_sequences])]),
        num_sequences=tokens.num_sequences + 1,
    )
    wanted = grpo_loss(logprobs, tokens, config, entropy).figures
    found = grpo_loss(torch.cat([logprobs, last]), padded, config, torch.cat([entropy, last + 2])).figures
    assert found.keys() == wanted.keys() and found["tokens"] == len(logprobs)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0.0, msg=name)


def test_kl_estimates() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    true = (p * (p.log() - q.log())).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum(), true)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()
    assert (kl_estimate(p.log(), p.log(), "k2") == 0).all()


def test_far_off_log_probabilities_stay_finite() -> None:
    new = torch.tensor([-200.0, -0.1], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-0.1, -200.0], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    tokens = Tokens(other, other, ones, ones, torch.tensor([0, 0]), 1, other)
    for name in PRESETS:
        total = grpo_loss(new, tokens, LossConfig(algorithm=name, kl_coef=0.1), ones).total
        assert torch.isfinite(total)
        assert torch.isfinite(torch.autograd.grad(total, new)[0]).all()


def test_importance_weights_are_truncated_and_constant() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -3.0, -0.5])
    weights = importance_weights(old, rollout, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, float(np.exp(-0.5))]))
    assert not weights.requires_grad


def test_mismatch_is_of_the_tokens_that_count() -> None:
    trainer, rollout = torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-1.5, -2.0, -1.0])
    figures = mismatch_figures(trainer, rollout, torch.tensor([True, True, False]))
    assert {name: float(value) for name, value in figures.items()} == {
        "mismatch/tokens": 2,
        "mismatch/abs_diff": pytest.approx(0.5),
        "mismatch/max": pytest.approx(0.5),
        "mismatch/kl": pytest.approx(np.exp(0.5) - 1.5),
    }


def test_what_is_missing_is_named() -> None:
    logprobs, tokens, entropy = tensors(make_sequences(), LossConfig())
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(logprobs, replace(tokens, ref=None), LossConfig(kl_coef=0.1), entropy)
    with pytest.raises(ValueError, match="entropy"):
        grpo_loss(logprobs, tokens, LossConfig(entropy_coef=0.1))
    with pytest.raises(ValueError, match="recompute"):
        LossConfig(importance_cap=2.0)
    with pytest.raises(ValueError, match="clipped-weight"):
        LossConfig(algorithm="cispo", dual_clip=3.0)
    for changes in (
        {"dual_clip": 1.0},
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"kl_coef": -1.0},
        {"entropy_coef": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            LossConfig(**changes)
