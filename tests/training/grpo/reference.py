"""The objectives written out sequence by sequence, token by token, in float64 numpy."""

from __future__ import annotations

import math

import numpy as np


def reference_advantages(rewards, kind):
    r = np.asarray(rewards, dtype=np.float64)
    if kind == "standardised":
        return (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    if kind == "centred":
        return r - r.mean()
    return np.array([value - np.delete(r, i).mean() for i, value in enumerate(r)])


def reference_loss(sequences, groups, config, constant_length):
    """sequences: dicts of float64 arrays new, old, rollout, ref, entropy and a number advantage. One loss."""
    parts = [token_losses(one, config) for one in sequences]
    kind = config.objective.aggregation
    if kind == "sequence-mean":
        return float(np.mean([part.mean() for part in parts]))
    if kind == "token-mean":
        return float(np.concatenate(parts).mean())
    if kind == "constant":
        return float(np.mean([part.sum() / constant_length for part in parts]))
    by_prompt = [np.concatenate([p for p, g in zip(parts, groups, strict=True) if g == x]) for x in sorted(set(groups))]
    return float(np.mean([part.mean() for part in by_prompt]))


def token_losses(one, config):
    objective, advantage = config.objective, one["advantage"]
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    sequence_ratio = math.exp(np.mean(one["new"] - one["old"]))
    losses = []
    for t in range(len(one["new"])):
        new, old = one["new"][t], one["old"][t]
        ratio = sequence_ratio if objective.policy == "sequence-clip" else math.exp(new - old)
        clipped = min(max(ratio, low), high)
        if objective.policy == "reinforce":
            loss = -advantage * new
        elif objective.policy == "clipped-weight":
            held = min(max(math.exp(one["frozen"][t] - old), low), high)  # no gradient through the weight
            loss = -held * advantage * new
        else:
            loss = -min(ratio * advantage, clipped * advantage)
            if config.dual_clip is not None and advantage < 0:
                loss = min(loss, -config.dual_clip * advantage)
        if config.importance_cap is not None:
            loss *= min(math.exp(old - one["rollout"][t]), config.importance_cap)
        d = one["ref"][t] - new
        kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[config.kl]
        losses.append(loss + config.kl_coef * kl - config.entropy_coef * one["entropy"][t])
    return np.array(losses)
