"""The loss on a GPU: one program per row reads its scores, forms the loss's slope and writes the scores' gradients, in
one launch per chunk. The loss itself is formed from the logprobs, N numbers, outside (objective.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.grpo_loss.objective import KLS, MAX_LOG_RATIO, Objective, Tokens
from vtengine_kernels.token_logprob.head import Head
from vtengine_kernels.token_logprob.products import over
from vtengine_kernels.token_logprob.triton import constants, scalars
from vtengine_kernels.triton_runtime import launch, missing

TOKEN_POLICIES = ("clip", "clipped-weight", "reinforce")

if missing() is None:
    import triton
    import triton.language as tl

    from vtengine_kernels.token_logprob.triton import row_gradients_, row_statistics

    @triton.jit
    def _bounded_exp(x, most):
        """e^x with x clamped to +-most; NaN stays NaN."""
        x = tl.where(x > most, most, x)
        return tl.exp(tl.where(x < -most, -most, x))

    @triton.jit
    def _policy_slope(
        logprob, old, advantage, clip_low, clip_high, dual_clip, most, POLICY: tl.constexpr, DUAL: tl.constexpr
    ):
        """The slope of a token's policy term in its logprob."""
        slope = -advantage
        if POLICY != 2:
            ratio = _bounded_exp(logprob - old, most)
            limited = tl.where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)
            limited = tl.where(limited < 1.0 - clip_low, 1.0 - clip_low, limited)
            if POLICY == 1:
                slope = -limited * advantage
            else:
                slope = -ratio * advantage
                bounded = -limited * advantage
                still = (bounded > slope) | (tl.abs(logprob - old) > most)
                if DUAL:
                    still |= (advantage < 0) & (tl.maximum(slope, bounded) > -dual_clip * advantage)
                slope = tl.where(still, 0.0, slope)
        return slope

    @triton.jit
    def _kl_slope(logprob, ref, most, KL: tl.constexpr):
        """The slope of a token's KL estimate in its logprob. KL: 1, 2, 3 as k1, k2, k3."""
        difference = ref - logprob
        slope = 1.0
        if KL == 2:
            slope = -difference
        if KL == 3:
            slope = 1.0 - _bounded_exp(difference, most)
        return tl.where(tl.abs(difference) > most, 0.0, slope)

    @triton.jit
    def _loss_gradients_kernel(
        scores_ptr, into_ptr, targets_ptr, advantages_ptr, weights_ptr, old_ptr, rollout_ptr, ref_ptr,
        logprobs_ptr, entropies_ptr, row_stride, into_stride, vocabulary, cold, cap,
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap, most,
        POLICY: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr, HAS_OLD: tl.constexpr,
        NARROW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_ptr = scores_ptr + row * row_stride
        target = tl.load(targets_ptr + row)
        logprob, entropy, log_sum = row_statistics(row_ptr, target, vocabulary, cold, cap, CAPPED, BLOCK)
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropies_ptr + row, entropy)
        weight = tl.load(weights_ptr + row)
        old = logprob
        if HAS_OLD:
            old = tl.load(old_ptr + row)
        slope = _policy_slope(
            logprob, old, tl.load(advantages_ptr + row), clip_low, clip_high, dual_clip, most, POLICY, DUAL
        )
        if CORRECTED:
            correction = _bounded_exp(old - tl.load(rollout_ptr + row), most)
            slope *= tl.where(correction > importance_cap, importance_cap, correction)
        if KL != 0:
            slope += kl_coef * _kl_slope(logprob, tl.load(ref_ptr + row), most, KL)
        row_gradients_(
            row_ptr, into_ptr + row * into_stride, target, vocabulary, log_sum, entropy,
            slope * weight, -entropy_coef * weight, cold, cap, NARROW, CAPPED, BLOCK,
        )  # fmt: skip


def switches(objective: Objective, tokens: Tokens) -> dict[str, int | bool]:
    """Compile-time arguments of the kernel that come from the objective."""
    return {
        "POLICY": TOKEN_POLICIES.index(objective.policy),
        "DUAL": objective.dual_clip is not None,
        "KL": KLS.index(objective.kl) + 1 if objective.kl_coef else 0,
        "CORRECTED": objective.importance_cap is not None,
        "HAS_OLD": tokens.old is not None,
    }


def gradients_(
    scores: Tensor, targets: Tensor, head: Head, tokens: Tokens, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """scores [C, V] -> (logprobs, entropies, float32 [C]; the loss's gradients, over the scores). No sequence-clip."""
    into = over(scores, head.weight)
    logprobs, entropies = torch.empty((2, len(scores)), device=scores.device)
    unused = tokens.weights
    per_token = (tokens.advantages, tokens.weights, tokens.old, tokens.rollout, tokens.ref)
    if len(scores):
        launch(
            _loss_gradients_kernel,
            (len(scores),),
            scores,
            into,
            targets.contiguous(),
            *((unused if x is None else x).contiguous() for x in per_token),
            logprobs,
            entropies,
            scores.stride(0),
            into.stride(0),
            *scalars(scores, head),
            objective.clip_low,
            objective.clip_high,
            objective.dual_clip or 0.0,
            objective.kl_coef,
            objective.entropy_coef,
            objective.importance_cap or 0.0,
            MAX_LOG_RATIO,
            NARROW=into.dtype != scores.dtype,
            **switches(objective, tokens),
            **constants(head),
        )
    return logprobs, entropies, into
