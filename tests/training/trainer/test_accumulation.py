"""Gradients over micro-batches and mini-batches: summed in float32, one micro-batch on the device, samples alike."""

from __future__ import annotations

import weakref
from dataclasses import fields, replace

import pytest
import torch
from vtengine_training.trainer.batch import MicroBatch, build_batch
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.figures import StepFigures
from vtengine_training.trainer.minibatch import MiniBatch, equal_parts

from tests.training.trainer.probe import collect


def gathered(optimizer):
    """The gradients so far, by name, which are forgotten."""
    found = {name: master.grad.clone() for name, master in optimizer.master.items()}
    optimizer.drop_gradients()
    return found


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def test_sixteen_bit_gradients_add_up_in_float32(run) -> None:
    one = run(dtype="bfloat16", update={"max_tokens": 1}, rollout={"prompts": 4})
    groups = collect(one)
    learner, optimizer = one.parts.learner, one.parts.learner.optimizer
    minibatch = learner.cutter.whole(groups)
    assert len(minibatch.batches) == 16
    learner.backward(minibatch, StepFigures())
    assert all(parameter.grad is None for parameter in one.parts.model.parameters())
    together = gathered(optimizer)
    assert all(gradient.dtype == torch.float32 for gradient in together.values())
    exact = {name: torch.zeros(x.shape, dtype=torch.float64) for name, x in together.items()}
    rounded = {name: torch.zeros(x.shape, dtype=torch.bfloat16) for name, x in together.items()}
    for batch in minibatch.batches:
        learner.backward(MiniBatch((batch,), 1), StepFigures())
        for name, gradient in gathered(optimizer).items():
            exact[name] += gradient
            rounded[name] += gradient.to(torch.bfloat16)
    whole = norm(exact.values())
    assert norm([together[name] - value for name, value in exact.items()]) < 1e-6 * whole
    assert norm([rounded[name] - value for name, value in exact.items()]) > 1e-3 * whole  # what the sums would lose


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"loss": {"kl_coef": 0.1}, "update": {"train_vision": False}}])
def test_the_estimate_counts_what_is_there(run, dtype, changes) -> None:
    one = run(dtype=dtype, **changes)
    groups = collect(one)
    learner, optimizer = one.parts.learner, one.parts.learner.optimizer
    learner.learn(groups, 1e-3)
    learner.backward(learner.cutter.whole(groups), StepFigures())
    held = [*one.parts.model.parameters(), *optimizer.master.values()]
    held += [master.grad for master in optimizer.master.values()]
    held += [state[key] for state in optimizer.adam.state.values() for key in ("exp_avg", "exp_avg_sq")]
    if learner.reference is not None:
        held += learner.reference.model.parameters()
    there = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in held}
    element = 4 if dtype == "float32" else 2
    cost = ModelCost.of(one.parts.model.config)
    update, kl_coef = one.config.update, one.config.loss.kl_coef
    assert sum(there.values()) == cost.training_bytes(element, bool(kl_coef), update.train_vision)


@pytest.mark.parametrize("old", ["rollout", "recompute"])
def test_one_micro_batch_is_on_the_device_at_a_time(run, monkeypatch, old) -> None:
    one = run(update={"max_tokens": 1, "minibatch_prompts": 1, "epochs": 2}, loss={"old_logprobs": old})
    groups = collect(one)
    there: set[int] = set()
    most, moves = 0, 0

    def move(batch, device):
        nonlocal most, moves
        moves += 1
        copies = {name: getattr(batch, name).clone() for name in ("token_ids", "pixel_values", "advantages")}
        for copy in copies.values():
            there.add(id(copy))
            weakref.finalize(copy, there.discard, id(copy))
        most = max(most, len(there))
        return replace(batch, **copies)

    monkeypatch.setattr(MicroBatch, "to", move)
    one.parts.learner.learn(groups, 1e-3)
    assert moves == 8 * (3 if old == "recompute" else 2)
    assert most == 3


@pytest.mark.parametrize(("epochs", "passes"), [(1, 8), (3, 8)])
def test_the_reference_runs_once_for_all_epochs(run, monkeypatch, epochs, passes) -> None:
    one = run(update={"max_tokens": 1, "epochs": epochs}, loss={"kl_coef": 0.1})
    groups, learner = collect(one), one.parts.learner
    asked = []
    logprobs = type(learner.reference).logprobs

    def counted(policy, batch):
        asked.append(policy)
        return logprobs(policy, batch)

    monkeypatch.setattr(type(learner.reference), "logprobs", counted)
    figures = learner.learn(groups, 1e-3)
    assert asked == [learner.reference] * passes
    assert (figures["kl"] > 0) == (epochs > 1)  # of the first update it is that of equal weights


def test_everything_of_a_micro_batch_moves(run) -> None:
    batch = build_batch(collect(run())[0].trajectories, [1.0] * 4, share_prefix=False)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    tensors = [getattr(moved, field.name) for field in fields(moved)]
    assert batch.placement is not None and moved.placement is not None
    tensors += [moved.placement.rows, moved.placement.order, moved.placement.starts]
    assert {x.device.type for x in tensors if isinstance(x, torch.Tensor)} == {"meta"}
    assert (moved.tree, moved.grids, moved.num_sequences) == (batch.tree, batch.grids, batch.num_sequences)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "prompt-mean", "constant"])
def test_samples_of_a_step_count_alike_whatever_mini_batch_they_are_in(run, aggregation) -> None:
    """Five groups, two to a mini-batch: the mean of the three gradients is that of all five groups together."""
    one = run(
        rollout={"prompts": 5, "max_refill": 3.0}, update={"minibatch_prompts": 2}, loss={"aggregation": aggregation}
    )
    groups = collect(one)
    learner, optimizer = one.parts.learner, one.parts.learner.optimizer
    loss = learner.backward(learner.cutter.whole(groups), StepFigures())
    whole = gathered(optimizer)
    parts = learner.cutter.cut(groups)
    losses = [learner.backward(part, StepFigures()) for part in parts]
    assert sum(losses) / 3 == pytest.approx(loss, rel=1e-5, abs=1e-7)
    for name, gradient in gathered(optimizer).items():
        torch.testing.assert_close(gradient / 3, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("groups", "size", "expected"),
    [(5, 2, [1, 2, 2]), (33, 32, [16, 17]), (32, 16, [16, 16]), (3, 4, [3]), (4, None, [4]), (7, 1, [1] * 7)],
)
def test_mini_batches_are_as_equal_as_can_be(groups, size, expected) -> None:
    outline = [(draw, [1]) for draw in range(groups)]
    parts = equal_parts(outline, size)
    assert [len(part) for part in parts] == expected
    assert [member for part in parts for member in part] == outline
