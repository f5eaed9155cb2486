"""The loss and both its gradients."""

from dataclasses import fields, replace

import pytest
import torch
from vtengine_kernels.grpo_loss import grpo_loss
from vtengine_kernels.grpo_loss.cases import OBJECTIVES, make_tokens
from vtengine_kernels.token_logprob import token_logprob
from vtengine_kernels.token_logprob.cases import CASES, Case

PICKED = {"usual": CASES["usual"], "64 rows of 32,768": Case(64, 512, 32_768)}


@pytest.mark.parametrize("objective", ["clip, k3, correction", "sequence-clip"])
@pytest.mark.parametrize("case", PICKED)
def test_grpo_loss(measure, impl, device, dtype, case, objective):
    hidden, head, targets = PICKED[case].tensors(dtype)
    made = make_tokens(token_logprob(hidden, head, targets)[0])
    moved = {f.name: x.to(device) for f in fields(made) if isinstance(x := getattr(made, f.name), torch.Tensor)}
    tokens, targets = replace(made, **moved), targets.to(device)
    hidden = hidden.to(device).requires_grad_()
    head = replace(head, weight=head.weight.to(device).requires_grad_())

    def call():
        loss = grpo_loss(hidden, head, targets, tokens, OBJECTIVES[objective], impl=impl)
        torch.autograd.grad(loss.total, [hidden, head.weight])

    measure("grpo_loss", f"{case}, {objective}", call)
