"""Log-probabilities alone, and with their gradients."""

from dataclasses import replace

import pytest
import torch
from vtengine_kernels.token_logprob import token_logprob
from vtengine_kernels.token_logprob.cases import CASES, Case

PICKED = {"usual": CASES["usual"], "64 rows of 32,768": Case(64, 512, 32_768)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", PICKED)
def test_token_logprob(measure, impl, device, dtype, case, backward):
    hidden, head, targets = PICKED[case].tensors(dtype)
    hidden, targets = hidden.to(device).requires_grad_(backward), targets.to(device)
    head = replace(head, weight=head.weight.to(device).requires_grad_(backward))

    def call():
        logprobs, _ = token_logprob(hidden, head, targets, impl=impl)
        if backward:
            torch.autograd.grad(logprobs.sum(), [hidden, head.weight])

    measure("token_logprob", f"{case}{', gradients' * backward}", call)
