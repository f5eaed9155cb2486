"""The packed step against a plain one: same loss and gradients, however it is cut, packed and shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vtengine_training.trainer.batch import build_batch, plan_micro_batches, same_prompt
from vtengine_training.trainer.step import TrainingDiverged
from vtengine_training.trainer.trajectory import Trajectory

from tests.training.trainer.probe import collect, gradients, nearly_equal, plain, same


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_packed_step_is_the_plain_one(run, algorithm) -> None:
    one = run(loss={"algorithm": algorithm, "entropy_coef": 0.01})
    groups = collect(one)
    same(gradients(one, groups), plain(one, groups))


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "prompt-mean", "constant"])
def test_micro_batching_changes_nothing(run, aggregation) -> None:
    one = run(loss={"aggregation": aggregation}, rollout={"prompts": 3, "n": 4})
    groups = collect(one)
    whole = gradients(one, groups, max_tokens=10**6)
    for max_tokens in (1, 150, 400):
        same(gradients(one, groups, max_tokens=max_tokens), whole)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("share_images", [True, False])
def test_savings_change_nothing(run, share_images, share_prefix) -> None:
    """Each saving, alone and together with the other, against the plain path: loss and gradients to 1e-6."""
    one = run(loss={"entropy_coef": 0.01}, rollout={"prompts": 3, "n": 4})
    groups = collect(one)
    saved = gradients(one, groups, share_images=share_images, share_prefix=share_prefix, max_tokens=10**6)
    nearly_equal(saved, plain(one, groups))


def test_vision_tower_sees_each_distinct_image_once(run, monkeypatch) -> None:
    one = run(rollout={"prompts": 3, "n": 4})
    groups = collect(one)
    seen = []
    tower = one.parts.model.visual
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, grids: seen.append(len(grids)) or forward(pixels, grids))
    for group in groups:
        distinct = {span.image.content_hash for t in group.trajectories for span in t.images}
        shown = sum(len(t.images) for t in group.trajectories)
        assert len(distinct) < shown
        for share, expected in ((True, len(distinct)), (False, shown)):
            seen.clear()
            gradients(one, [group], share_images=share, share_prefix=False, max_tokens=10**6)
            assert seen == [expected]


def test_siblings_share_their_prompt_and_nothing_else(run) -> None:
    one = run(rollout={"prompts": 2, "n": 4})
    first, second = (group.trajectories for group in collect(one))
    members = [*first, *second]
    batch = build_batch(members, [1.0] * 8)
    assert batch.tree.parents == (-1, 0, 0, 0, 0, -1, 5, 5, 5, 5)
    prompts = [group[0].prompt_length for group in (first, second)]
    assert batch.tree.num_tokens == sum(map(len, members)) - 3 * sum(prompts)
    plain_batch = build_batch(members, [1.0] * 8, share_prefix=False)
    assert plain_batch.tree.lengths == tuple(map(len, members))
    assert torch.equal(batch.token_ids[batch.sources], plain_batch.token_ids[plain_batch.sources])
    assert torch.equal(batch.positions[:, batch.sources], plain_batch.positions[:, plain_batch.sources])
    other = replace(first[1], token_ids=first[1].token_ids.copy())
    other.token_ids[0] ^= 1
    assert not same_prompt(first[0], other)
    span = first[1].images[0]
    swapped = replace(span, image=replace(span.image, content_hash="another"))
    assert not same_prompt(first[0], replace(first[1], images=(swapped, *first[1].images[1:])))


def test_logits_in_chunks_change_nothing(run) -> None:
    one = run(loss={"entropy_coef": 0.1})
    groups = collect(one)
    same(gradients(one, groups, logits_chunk=3), gradients(one, groups, logits_chunk=10**6))


LOSSES = [
    {"algorithm": "grpo", "kl_coef": 0.1, "entropy_coef": 0.05},
    {"algorithm": "dapo", "dual_clip": 1.2, "kl_coef": 0.1, "kl": "k2"},
    {"algorithm": "gspo", "entropy_coef": 0.01},
    {"algorithm": "cispo", "kl_coef": 0.1, "kl": "k1"},
    {"algorithm": "rloo"},
    {"algorithm": "grpo", "old_logprobs": "recompute", "importance_cap": 1.05},
    {"algorithm": "gspo", "old_logprobs": "recompute"},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
def test_the_kernel_has_the_gradients_of_plain_logits(run, loss) -> None:
    one = run(loss=loss, rollout={"temperature": 0.8})
    groups = collect(one)
    torch.manual_seed(0)
    with torch.no_grad():  # some way off the sampling weights, so that ratios clip
        for parameter in one.parts.model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    for chunk in (3, 10**6):
        fused, plain = (gradients(one, groups, logits=way, logits_chunk=chunk) for way in ("fused", "plain"))
        assert any((gradient != 0).any() for gradient in fused[1].values())
        same(fused, plain)


def test_recomputed_layers_change_nothing(run) -> None:
    one, again = run(), run(update={"recompute": True})
    groups = collect(one)
    same(gradients(again, groups), gradients(one, groups))


def test_frozen_vision_tower_gets_no_gradient_and_the_rest_the_same(run) -> None:
    one, frozen = run(), run(update={"train_vision": False})
    groups = collect(one)
    loss, found = gradients(frozen, groups)
    assert not any(name.startswith("visual") for name in found)
    expected = gradients(one, groups)
    same((loss, found), (expected[0], {name: g for name, g in expected[1].items() if not name.startswith("visual")}))


def test_temperature_is_the_engines(run) -> None:
    one = run(rollout={"temperature": 1.7})
    groups = collect(one)
    batch = build_batch(groups[0].trajectories, [1.0] * 4)
    logprobs, _ = one.parts.learner.policy.logprobs(batch)
    torch.testing.assert_close(logprobs.detach(), batch.rollout, rtol=1e-4, atol=1e-5)


def trajectory(prompt, reply):
    """A prompt of that many tokens, all alike, and a reply."""
    length = prompt + reply
    return Trajectory(
        token_ids=np.full(length, prompt),
        positions=torch.arange(length).expand(3, -1),
        trainable=np.arange(length) >= prompt,
        logprobs=np.zeros(length, np.float32),
        images=(),
        version=0,
        advantage=1.0,
        facts={},
    )


def test_micro_batches_keep_siblings_together_and_order() -> None:
    groups = [[trajectory(1, 3)] * 3, [trajectory(2, 3)] * 3, [trajectory(10, 20)] * 2]
    plan = plan_micro_batches(groups, 20, share_prefix=False)
    assert plan == [[(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)], [(2, 0)], [(2, 1)]]
    assert plan_micro_batches(groups, 10**6) == [[(g, t) for g, group in enumerate(groups) for t in range(len(group))]]
    assert plan_micro_batches([], 10) == []


def test_max_tokens_counts_packed_tokens() -> None:
    groups = [[trajectory(10, 4)] * 6, [trajectory(12, 2)] * 2]
    plan = plan_micro_batches(groups, 26)
    assert plan == [[(0, t) for t in range(4)], [(0, 4), (0, 5)], [(1, 0), (1, 1)]]
    for members in plan:
        chosen = [groups[g][t] for g, t in members]
        assert len(build_batch(chosen, [1.0] * len(chosen)).token_ids) <= 26
    assert plan_micro_batches(groups, 50) == [[*((0, t) for t in range(6)), (1, 0), (1, 1)]]


def test_recomputed_ratios_are_one_in_the_first_update(run) -> None:
    one = run(loss={"old_logprobs": "recompute", "importance_cap": 2.0}, update={"epochs": 2, "minibatch_prompts": 1})
    figures = one.parts.learner.learn(collect(one), 0.0)
    assert figures["updates"] == 4
    assert abs(figures["approx_kl"]) < 1e-6 and figures["clip_frac"] == 0  # with and without gradients: other sums


def moved_on(one) -> None:
    """The weights are other ones than those that sampled."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in one.parts.model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    one.parts.learner.version += 1


@pytest.mark.parametrize("epochs", [1, 2])
def test_of_older_weights_ratios_refer_to_what_the_engine_sampled_with(run, epochs) -> None:
    """Recomputed log-probabilities would say that a group left over is on-policy."""
    figures = {}
    for way in ("rollout", "recompute"):
        one = run(loss={"old_logprobs": way}, update={"epochs": epochs})
        groups = collect(one)
        moved_on(one)
        figures[way] = one.parts.learner.learn(groups, 0.0)
    assert abs(figures["rollout"]["approx_kl"]) > 1e-3
    for name in ("approx_kl", "clip_frac", "grad_norm", "loss", "tokens/trained"):
        assert figures["recompute"][name] == pytest.approx(figures["rollout"][name], rel=1e-4, abs=1e-6), name


def test_groups_of_the_present_weights_are_recomputed_beside_older_ones(run) -> None:
    one = run(loss={"old_logprobs": "recompute"})
    learner, groups = one.parts.learner, collect(one)
    moved_on(one)
    alone = learner.learn(groups[:1], 0.0)
    fresh = tuple(replace(one, version=learner.version) for one in groups[1].trajectories)
    both = learner.learn([groups[0], replace(groups[1], trajectories=fresh)], 0.0)
    assert alone["approx_kl"] and both["tokens/trained"] > alone["tokens/trained"]
    assert both["approx_kl"] * both["tokens/trained"] == pytest.approx(
        alone["approx_kl"] * alone["tokens/trained"], rel=1e-3
    )


def test_an_importance_cap_corrects_older_weights_without_a_pass(run, monkeypatch) -> None:
    one = run(loss={"old_logprobs": "recompute", "importance_cap": 2.0})
    groups = collect(one)
    moved_on(one)
    monkeypatch.setattr(one.parts.learner, "_logprobs", lambda *_: pytest.fail("a pass more"))
    assert one.parts.learner.learn(groups, 0.0)["approx_kl"] == pytest.approx(0.0, abs=1e-6)


def test_non_finite_updates_are_skipped_counted_and_bounded(run) -> None:
    one = run(update={"max_skipped": 3})
    learner, model = one.parts.learner, one.parts.model
    groups = collect(one)
    before = {name: p.clone() for name, p in model.named_parameters()}
    members = groups[0].trajectories
    broken = [type(t)(**{**vars(t), "advantage": float("nan")}) for t in members]
    bad = [type(groups[0])(0, 0, 1, tuple(broken))]
    for _ in range(2):
        assert learner.learn(bad, 1e-3)["updates/skipped"] == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert learner.learn(groups, 1e-3)["updates/skipped"] == 0
    assert learner.skipped == 0
    with pytest.raises(TrainingDiverged, match="3 updates"):
        for _ in range(3):
            learner.learn(bad, 1e-3)
