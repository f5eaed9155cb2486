"""The Triton kernels of token_logprob and grpo_loss without a GPU: interpreted, and compiled; and with one."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels.grpo_loss import grpo_loss
from vtengine_kernels.grpo_loss.cases import OBJECTIVES, make_tokens
from vtengine_kernels.token_logprob import token_logprob, triton
from vtengine_kernels.token_logprob.cases import CASES, Case

from benchmarks.suites import triton_resources
from tests.kernels.interpreting import run_interpreted
from tests.kernels.test_grpo_loss import agree
from tests.kernels.test_grpo_loss import run as run_loss
from tests.kernels.test_token_logprob import distance, run

SPECS = [spec for spec in triton_resources.SPECS if spec.op in ("token_logprob", "grpo_loss")]
pytestmark = [
    pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing())),
    pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set"),
]

INTERPRETED = """
import json, torch
from tests.kernels import test_grpo_loss as loss, test_token_logprob as plain
from vtengine_kernels.grpo_loss.cases import OBJECTIVES
from vtengine_kernels.token_logprob.cases import CASES, Case
torch.set_deterministic_debug_mode("error")  # memory that nobody wrote holds NaN
few = {name: Case(**{**vars(case), "rows": min(9, case.rows)}) for name, case in CASES.items()}
for name, case in few.items():
    exact, torchs = plain.run(case, "ref", torch.float64), plain.run(case, "ref")
    for x, y, z in zip(plain.run(case, "triton", chunk=5), torchs, exact, strict=True):
        assert plain.distance(x, z) <= 1.5 * plain.distance(y, z) + 2e-6 * float(z.norm()) + 1e-9, name
small = Case(7, 16, 257, temperature=0.8, soft_cap=8.0, num_banned=2, rank=3)
for name, objective in OBJECTIVES.items():
    for change in (None, {"old": None}) if "correction" in name else (None,):
        true = loss.run(small, objective, "ref", torch.float64, change=change)
        loss.agree(loss.run(small, objective, "triton", chunk=5, change=change), true)
for name, case in few.items():
    objective = OBJECTIVES["clip, k1, entropy"]
    loss.agree(loss.run(case, objective, "triton", chunk=5), loss.run(case, objective, "ref", torch.float64))
# what another row's or another chunk's kernel may not touch, and what is broken shows
hidden, head, targets = few["prime"].tensors()
hidden[3] = float("nan")
for bad, clean in zip(
    loss.token_logprob(hidden, head, targets, impl="triton"), loss.token_logprob(hidden, head, targets, impl="ref")
):
    assert not bad[3].isfinite(), bad
    assert torch.allclose(bad[4:], clean[4:], atol=1e-5)
# bfloat16 inputs: the interpreter cuts a number to bfloat16 where a GPU rounds it
narrow = loss.run(small, OBJECTIVES["clip, k1, entropy"], "triton", torch.bfloat16, chunk=5)
loss.agree(narrow, loss.run(small, OBJECTIVES["clip, k1, entropy"], "ref", torch.float64), loss=5e-6, gradient=1e-2)
# rows further apart than the vocabulary: gaps are left alone
from vtengine_kernels.token_logprob import eager, triton
wide = torch.full((9, 1100), float("nan"))
scores = wide[:, :1013].normal_(generator=torch.Generator().manual_seed(0))
expected = scores.clone()
slopes = (torch.randn(9), torch.randn(9))
for module, mine in ((triton, scores), (eager, expected)):
    _, entropies, sums = module.statistics(mine, targets, head)
    module.gradients_(mine, targets, sums, entropies, slopes, head)
assert torch.allclose(scores, expected, atol=1e-5) and wide[:, 1013:].isnan().all()
# a column of a table of ids is no array of ids
column = torch.stack((targets, 0 * targets), 1)[:, 0]
for strided, plainly in zip(
    loss.token_logprob(hidden, head, column, impl="triton"), loss.token_logprob(hidden, head, targets, impl="triton")
):
    assert torch.equal(strided.nan_to_num(), plainly.nan_to_num())
# gradients of half the size, over the first halves of the rows (float16: the interpreter rounds it)
from vtengine_kernels.grpo_loss import objective as objectives, triton as loss_triton
from vtengine_kernels.token_logprob import products
products.operand_dtype = lambda weight: torch.float16
hidden, head, targets = Case(9, 16, 9001, soft_cap=8.0).tensors()
scores, tokens, objective = 3 * torch.randn(9, 9001), loss.make_tokens(torch.full((9,), -9.0)), OBJECTIVES["clip, k2"]
made = []
for module in (triton, eager):
    mine = scores.clone()
    logprobs, entropies, sums = module.statistics(mine, targets, head)
    slopes = objectives.losses_and_slopes(logprobs, entropies, tokens, objective)[1:]
    made.append(module.gradients_(mine, targets, sums, entropies, slopes, head))
    assert made[-1].dtype == torch.float16 and made[-1].data_ptr() == mine.data_ptr()
made.append(loss_triton.gradients_(scores, targets, head, tokens, objective)[2])
assert made[0].abs().max() > 0.01
for one in made[1:]:
    assert torch.allclose(made[0].float(), one.float(), rtol=1e-3, atol=1e-7)
print(json.dumps("done"))
"""


def test_interpreted_it_errs_no_more_than_torch():
    assert run_interpreted(INTERPRETED) == "done"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("arch", triton_resources.ARCHITECTURES)
def test_it_compiles_without_spills(tmp_path, spec, arch):
    needs = triton_resources.needs(spec, arch, tmp_path)
    assert needs.spill_bytes == 0
    assert needs.registers <= 128  # so that two programs of eight warps share a multiprocessor
    assert needs.shared_bytes <= 48 * 1024


@pytest.mark.parametrize("arch", triton_resources.ARCHITECTURES)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.constants.get("NARROW")], ids=lambda spec: spec.label)
def test_a_block_is_read_by_all_threads_before_its_gradients_are_written_over_it(tmp_path, spec, arch):
    triton_resources.needs(spec, arch, tmp_path)
    before = (tmp_path / "kernel.ptx").read_text().split("st.global.v4.b32")[0]
    assert "bar.sync" in before[before.rindex("ld.global") :]


@pytest.mark.parametrize("arch", triton_resources.ARCHITECTURES)
@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.kernel == "_loss_gradients_kernel"], ids=lambda spec: spec.label
)
def test_the_targets_score_is_read_by_all_threads_before_gradients_are_written_over_it(tmp_path, spec, arch):
    triton_resources.needs(spec, arch, tmp_path)
    before = (tmp_path / "kernel.ptx").read_text().split("st.global.v4.b32")[0]
    assert "bar.sync" in before[before.rindex("st.global.b32") :]  # of the logprob, which is made of that score


def on_gpu(case, objective, impl, dtype, chunk):
    """(loss, gradients) as `run_loss` gives them, computed on the GPU."""
    hidden, head, targets = case.tensors(dtype)
    hidden, weight, targets = hidden.cuda().requires_grad_(), head.weight.cuda().requires_grad_(), targets.cuda()
    banned = None if head.banned is None else head.banned.cuda()
    head = type(head)(weight, head.temperature, head.soft_cap, banned)
    tokens = make_tokens(token_logprob(*case.tensors(), impl="ref")[0])
    moved = type(tokens)(
        *(getattr(tokens, name).cuda() for name in ("advantages", "weights", "old", "rollout", "ref", "sequences")),
        tokens.num_sequences,
    )
    loss = grpo_loss(hidden, head, targets, moved, objective, impl=impl, chunk=chunk)
    return loss, [x.double().cpu() for x in torch.autograd.grad(loss.total, [hidden, weight])]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(name, dtype):
    case = Case(300, 256, 4099, temperature=0.9, num_banned=3)
    true = run_loss(case, OBJECTIVES[name], "ref", torch.float64)
    for impl in ("triton", "torch"):
        loss, gradient = (2e-6, 2e-5) if dtype == torch.float32 else (1e-5, 5e-3)
        agree(on_gpu(case, OBJECTIVES[name], impl, dtype, chunk=128), true, loss, gradient)


@pytest.mark.gpu
def test_more_scores_than_32_bits_count():
    """2^31 scores and some more: the last row's are written where they belong."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of the GPU's memory are free")
    rows, vocabulary = 16_400, 131_072
    hidden = torch.randn(rows, 8, device="cuda", dtype=torch.bfloat16)
    head = Case(1, 8, vocabulary).tensors(torch.bfloat16)[1]
    head = type(head)(head.weight.cuda())
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    whole = token_logprob(hidden, head, targets, impl="triton", chunk=rows)
    pieces = token_logprob(hidden, head, targets, impl="triton", chunk=1024)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.rank])
def test_logprobs_on_the_gpu(name):
    hidden, head, targets = CASES[name].tensors()
    exact = run(CASES[name], "ref", torch.float64)[:2]
    banned = None if head.banned is None else head.banned.cuda()
    moved = type(head)(head.weight.cuda(), head.temperature, head.soft_cap, banned)
    for found, true in zip(token_logprob(hidden.cuda(), moved, targets.cuda(), impl="triton"), exact, strict=True):
        assert distance(found.double().cpu(), true) <= 5e-6 * float(true.norm()) + 1e-9
