"""token_sample against float64, in each implementation; the Triton one interpreted, and compiled."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels.token_sample import Truncation, native, token_sample, triton

from benchmarks.suites import triton_resources
from tests.kernels.interpreting import run_interpreted

TRITON = [
    pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing())),
    pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set"),
]
SPECS = [spec for spec in triton_resources.SPECS if spec.op == "token_sample"]
LIMITS = Truncation(torch.ones(2, dtype=torch.int64), torch.ones(2), torch.zeros(2))
SIZES = (1, 5, 16, 17, 576, 4096, 4097, 9001)
SLACK = 3e-7  # weights are float32: a draw so close to the border between two ids may fall to either


def rows(vocabulary, device="cpu"):
    """(scores, draws, temperature): usual rows, and equal, banned, rounded, far apart and barely different ones."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 4 * torch.randn(12, vocabulary, generator=generator)
    scores[1] = 0
    scores[2, :-1] = -torch.inf
    scores[3] = scores[3].round()
    scores[4] = -200
    scores[4, vocabulary // 2] = 50
    scores[5, ::2] = -torch.inf
    scores[5, -1] = 0
    scores[6] -= 100
    draws = torch.rand(12, generator=generator, dtype=torch.float64)
    draws[7:9], draws[9:] = 0, 1 - 2.0**-53
    temperature = torch.rand(12, generator=generator) + 0.3
    temperature[10] = 1e-6
    return scores.to(device), draws.to(device), temperature.to(device)


def misses(scores, draws, temperature, ids, logprobs):
    """What is wrong with a result: (ids that are not the ones, the largest error of a log-probability, relative to the
    scores where those are large)."""
    exact = scores.double() if temperature is None else scores.double() / temperature.double()[:, None]
    true = exact.log_softmax(1)
    own = true.gather(1, ids[:, None])[:, 0]
    size = exact.masked_fill(exact == -torch.inf, 0).abs().amax(1).clamp(min=1)
    error = float(((logprobs - own).abs() / size).max())
    if draws is None:
        return int((ids != scores.argmax(1)).sum()), error
    after = true.exp().cumsum(1).gather(1, ids[:, None])[:, 0]
    inside = (draws < after + SLACK) & (draws >= after - own.exp() - SLACK) & (own > -torch.inf)
    return int((~inside).sum()), error


def check(impl, device="cpu"):
    for vocabulary in SIZES:
        scores, draws, temperature = rows(vocabulary, device)
        for given in ((None, None), (draws, temperature)):
            ids, logprobs = token_sample(scores, *given, impl=impl)
            assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
            wrong, error = misses(scores, *given, ids, logprobs)
            assert wrong == 0 and error < 2e-6, (impl, vocabulary, given[0] is None, wrong, error)
        whole = torch.full((12, vocabulary + 3), torch.inf, device=device)  # what lies beside a row is not read
        whole[:, :vocabulary] = scores
        again = token_sample(whole[:, :vocabulary], draws, temperature, impl=impl)
        assert torch.equal(again[0], ids) and torch.equal(again[1], logprobs)
        one = token_sample(scores[3:4], draws[3:4], temperature[3:4], impl=impl)
        assert one[0] == ids[3] and abs(one[1] - logprobs[3]) < 1e-5
    for bad in (torch.nan, torch.inf):
        scores = torch.randn(2, 5000, device=device)
        scores[0, 7] = bad
        for given in ((None, None), (torch.rand(2, dtype=torch.float64, device=device), torch.ones(2, device=device))):
            ids, logprobs = token_sample(scores, *given, impl=impl)
            assert logprobs.isnan().tolist() == [True, False] and 0 <= int(ids[0]) < 5000
    assert token_sample(torch.zeros(0, 9, device=device), impl=impl)[0].shape == (0,)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_ids_and_logprobs(impl):
    check(impl)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_ids_and_logprobs_in_cpp(isa):
    check("cpu")


@pytest.mark.parametrize("impl", ["auto", "torch", "ref"])
def test_draws_cover_the_distribution_in_the_order_of_ids(impl):
    scores = torch.tensor([0.1, 0.4, 0.0, 0.5]).log().repeat(10, 1)
    draws = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    ids, _ = token_sample(scores, draws, torch.ones(10), impl=impl)
    assert ids.tolist() == [0, 1, 1, 1, 1, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(2, 3, dtype=torch.bfloat16)}, "scores"),
        ({"scores": torch.zeros(2, 0)}, "scores"),
        ({"draws": None}, "both or neither"),
        ({"draws": torch.zeros(2)}, "draws"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"impl": "fast"}, "impl"),
        ({"truncation": Truncation(torch.ones(2), torch.ones(2), torch.zeros(2))}, "top_k"),
        ({"draws": None, "temperature": None, "truncation": LIMITS}, "truncation without draws"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = {"scores": torch.zeros(2, 3), "draws": torch.zeros(2, dtype=torch.float64), "temperature": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        token_sample(**(given | changes))


class TestTriton:
    pytestmark = TRITON

    def test_interpreted(self):
        code = "import json; from tests.kernels.test_token_sample import check; check('triton'); print(json.dumps(1))"
        assert run_interpreted(code) == 1

    @pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
    @pytest.mark.parametrize("arch", triton_resources.ARCHITECTURES)
    def test_compiles_without_spills(self, tmp_path, record_property, arch, spec):
        needs = triton_resources.needs(spec, arch, tmp_path)
        record_property("needs", str(needs))
        assert needs.spill_bytes == 0 and needs.registers <= 144  # Triton 3.7; others stay below 128


@pytest.mark.gpu
def test_on_the_gpu():
    check("triton", "cuda")
