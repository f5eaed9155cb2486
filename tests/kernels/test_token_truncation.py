"""token_sample with top-k, top-p and min-p against a sort in numpy's float64, in each implementation."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from vtengine_kernels.token_sample import Truncation, native, ref, threshold, token_sample, triton
from vtengine_kernels.token_sample.levels import MAX_VOCABULARY, UNIT_BITS

from tests.kernels.interpreting import run_interpreted

SLACK = 1e-6  # weights are float32: a border of mass so close to a draw, or to top_p, may fall to either side
LAST = 1 - 2.0**-53
LIMITS = [  # top_k, top_p, min_p
    (1, 1.0, 0.0),
    (2, 0.5, 0.0),
    (7, 1.0, 0.0),
    (40, 0.9, 0.02),
    (10**6, 0.3, 0.0),
    (10**6, 0.9, 0.0),
    (10**6, 0.999, 0.0),
    (10**6, 1e-30, 0.0),
    (10**6, 1.0, 0.1),
    (10**6, 1.0, 1.0),
    (3, 0.999, 0.2),
    (10**6, 1.0, 0.0),
]


def rows(vocabulary):
    """(scores, temperature): usual, equal, banned, rounded, far apart, barely different, zeros of two signs."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 4 * torch.randn(12, vocabulary, generator=generator)
    temperature = torch.rand(12, generator=generator) + 0.4
    scores[1] = 0
    scores[2, :-1] = -torch.inf
    scores[3] = scores[3].round()
    scores[4] = -200
    scores[4, vocabulary // 2] = 50
    scores[5, ::2] = -torch.inf
    scores[5, -1] = 0
    scores[6] = 8 + torch.arange(vocabulary) % 5 * 2.0**-20  # neighbours among the floats
    scores[7] = (scores[7] > 3).float() * -0.0
    scores[7, 1::3] *= -1
    temperature[8:10] = torch.tensor([1e-6, 50.0])
    return scores, temperature


def case(vocabulary, shift):
    """Every row with other limits, (scores, temperature, truncation), for each shift."""
    scores, temperature = rows(vocabulary)
    chosen = [LIMITS[(n + shift) % len(LIMITS)] for n in range(len(scores))]
    top_k, top_p, min_p = zip(*chosen, strict=True)
    return scores, temperature, Truncation(torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p))


def kept(scores, temperature, top_k, top_p, min_p):
    """float64 [V]: the weight of every id that is kept, 0 for the others; by a sort, one id after the other."""
    scaled = scores.double().numpy() / float(temperature)
    weights = np.exp(scaled - scaled.max())
    ranked = sorted(range(len(scores)), key=lambda n: (-float(scores[n]), n))[:top_k]
    total, before, keep = weights[ranked].sum(), 0.0, []
    for n in ranked:
        if keep and top_p < 1 and before >= top_p * total:
            break
        keep.append(n)
        before += weights[n]
    found = np.zeros(len(scores))
    keep = [n for n in keep if weights[n] >= min_p * weights[ranked[0]]]
    found[keep] = weights[keep]
    return found


def is_right(weights, draw, found, logprob, scale):
    """Whether (found, logprob) is what a draw from these weights gives."""
    share = weights / weights.sum()
    after = share.cumsum()[found]
    inside = share[found] > 0 and after - share[found] - SLACK <= draw < after + SLACK
    return inside and abs(logprob - np.log(share[found])) <= 2e-6 * scale


def around(share):
    """Where a border may lie; 1 is no border of mass, and none of probability above the best."""
    return {share} if share in (0, 1) else {share * (1 - SLACK), share, share * (1 + SLACK)}


def check(impl, sizes, draws, shifts=range(0, 12, 3), device="cpu"):
    for vocabulary, shift in ((size, shift) for size in sizes for shift in shifts):
        scores, temperature, truncation = case(vocabulary, shift)
        limits = [x.tolist() for x in (truncation.top_k, truncation.top_p, truncation.min_p)]
        sent = Truncation(*(x.to(device) for x in (truncation.top_k, truncation.top_p, truncation.min_p)))
        results = []
        for draw in draws:
            given = torch.full((len(scores),), draw, dtype=torch.float64, device=device)
            results.append(token_sample(scores.to(device), given, temperature.to(device), sent, impl=impl))
        for n, (top_k, top_p, min_p) in enumerate(zip(*limits, strict=True)):
            scale = float(scores[n][scores[n] > -torch.inf].abs().max() / temperature[n]) + 1
            sides = itertools.product(around(top_p), around(min_p))
            weights = [kept(scores[n], temperature[n], top_k, *side) for side in sides]
            for draw, (ids, logprobs) in zip(draws, results, strict=True):
                found = int(ids[n]), float(logprobs[n])
                assert any(is_right(w, draw, *found, scale) for w in weights), (vocabulary, shift, n, draw, found)


def check_what_holds_for_any_row(impl, vocabulary=300, some=slice(None), device="cpu"):
    scores, temperature = (x[some].to(device) for x in rows(vocabulary))
    count, best = len(scores), scores.argmax(1)

    def sample(draw, top_k=10**6, top_p=1.0, min_p=0.0, order=slice(None)):
        limits = torch.full((count,), top_k), torch.full((count,), top_p), torch.full((count,), min_p)
        draws = torch.full((count,), draw, dtype=torch.float64, device=device)
        arguments = scores[order], draws, temperature[order], Truncation(*(x.to(device) for x in limits))
        return token_sample(*arguments, impl=impl)

    for limits in ({"top_k": 1}, {"top_p": 1e-30}):
        ids, logprobs = sample(0.9, **limits)
        assert torch.equal(ids, best) and (logprobs == 0).all()
    whole = sample(0.4)
    draws = torch.full((count,), 0.4, dtype=torch.float64, device=device)
    plain = token_sample(scores, draws, temperature, impl=impl)
    assert torch.equal(whole[0], plain[0]) and torch.allclose(whole[1], plain[1], atol=1e-6)
    backwards = torch.arange(count - 1, -1, -1, device=device)
    once, again = sample(0.6, 20, 0.8), sample(0.6, 20, 0.8, order=backwards)
    assert torch.equal(once[0], again[0].flip(0)) and torch.equal(once[1], again[1].flip(0))


def check_ties_and_faults(impl, vocabulary, device="cpu"):
    """Equal scores: the lowest ids, as many as count; what is not a number is reported and stays in its row."""
    scores = torch.zeros(5, vocabulary, device=device)
    scores[3, 5], scores[4, vocabulary - 1] = torch.nan, torch.inf
    top_k, top_p = torch.tensor([3, vocabulary, 6, 3, 3]), torch.tensor([1.0, 3.5 / vocabulary, 0.5, 1.0, 0.5])
    limits = Truncation(*(x.to(device) for x in (top_k, top_p, torch.zeros(5))))
    temperature = torch.full((5,), 0.7, device=device)
    for draw, expected in ((0.0, [0, 0, 0]), (LAST, [2, 3, 2])):
        draws = torch.full((5,), draw, dtype=torch.float64, device=device)
        ids, logprobs = token_sample(scores, draws, temperature, limits, impl=impl)
        assert ids[:3].tolist() == expected
        assert logprobs[:3].tolist() == pytest.approx(np.log([1 / 3, 1 / 4, 1 / 3]).tolist(), abs=1e-6)
        assert logprobs[3:].isnan().all() and (ids[3:] >= 0).all() and (ids[3:] < vocabulary).all()
    nothing = torch.full((5, vocabulary), -torch.inf, device=device)
    assert token_sample(nothing, draws, temperature, limits, impl=impl)[1].isnan().all()


def flat_rows(vocabulary):
    """(scores, truncation): many ids that are about as likely, as a model without training, or a high temperature,
    has them; then scores of few values, as a head in bfloat16 has them, and of one."""
    normal = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5))
    kinds = [*(normal * size for size in (0.02, 0.1, 0.5, 1)), (normal / 2).bfloat16().float(), torch.zeros(vocabulary)]
    limits = [(10**6, 0.95), (10**6, 0.999), (50_000, 1.0), (50_000, 0.95)]
    scores, chosen = zip(*itertools.product(kinds, limits), strict=True)
    top_k, top_p = zip(*chosen, strict=True)
    return torch.stack(scores), Truncation(torch.tensor(top_k), torch.tensor(top_p), torch.zeros(len(scores)))


def check_flat_rows(some=slice(None), device="cpu", vocabulary=151_936):
    """As the reference has it, by a search of a small part of each row."""
    scores, limits = flat_rows(vocabulary)
    scores, top_k, top_p, min_p = (x[some] for x in (scores, limits.top_k, limits.top_p, limits.min_p))
    draws = torch.rand(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    sent = [x.to(device) for x in (scores, draws, torch.ones(len(scores)), top_k, top_p, min_p)]
    with mock.patch.object(threshold, "launch", wraps=threshold.launch) as launched:
        ids, logprobs = token_sample(*sent[:3], Truncation(*sent[3:]), impl="triton")
    kernel, _, *given = launched.call_args.args
    searched = dict(zip(kernel.arg_names, given, strict=False))["totals_ptr"][:, -1]
    assert int(searched.max()) < vocabulary // 8 < threshold.CAPACITY
    for n, row in enumerate(scores):
        probs = row.double().softmax(0)
        masks = [ref.kept(row, probs, int(top_k[n]), side, 0.0) for side in around(float(top_p[n]))]
        found = int(ids[n]), float(logprobs[n])
        assert any(is_right((probs * mask).numpy(), float(draws[n]), *found, 20) for mask in masks), (n, found)


def check_all(impl, device="cpu"):
    check(impl, (1, 2, 17, 576, 4099), (0.0, 0.21, 0.5, 0.83, LAST), device=device)
    check_what_holds_for_any_row(impl, device=device)
    check_ties_and_faults(impl, 9001, device)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_what_is_kept(impl):
    check_all(impl)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_what_is_kept_in_cpp(isa):
    check_all("cpu")


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_many_ids_are_halved_where_they_are_not_few():
    """A flat row of a model's size, with a border deep in it: quickselect, not the sort of a few."""
    scores = torch.randn(2, 150_000, generator=torch.Generator().manual_seed(3))
    limits = Truncation(torch.tensor([150_000, 60_000]), torch.tensor([0.9, 0.7]), torch.zeros(2))
    arguments = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.ones(2), limits
    results = [token_sample(scores, *arguments, impl=impl) for impl in ("cpu", "ref")]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-5)


def test_rows_whose_masses_might_not_fit_are_left_to_others(monkeypatch):
    """Masses are integers: of 2 ** 18 equal scores their sum fits, of 2 ** 19 it would not."""
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    most = torch.zeros(1, 1).expand(1, MAX_VOCABULARY)
    assert triton.takes(most) and most.shape[1] << UNIT_BITS < 1 << 63
    scores, limits = torch.zeros(1, MAX_VOCABULARY + 1), Truncation(*map(torch.tensor, ([3], [1.0], [0.0])))
    arguments = torch.tensor([0.5], dtype=torch.float64), torch.ones(1), limits
    assert int(token_sample(scores, *arguments)[0]) == 1
    with pytest.raises(ValueError, match=r"impl = 'triton' takes no .*\[1, 262145\]"):
        token_sample(scores, *arguments, impl="triton")


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
@pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(
    "what",
    [
        "check('triton', (17,), (0.21, LAST), (0,))",
        "check('triton', (4099,), (0.5,), (9,))",
        "check_what_holds_for_any_row('triton', 19, slice(3, 7))",
        "check_ties_and_faults('triton', 9001)",
        "check_flat_rows(slice(0, None, 5))",
    ],
)
def test_interpreted(what):
    code = f"import json; from tests.kernels.test_token_truncation import *; {what}; print(json.dumps(1))"
    assert run_interpreted(code) == 1


@pytest.mark.gpu
def test_on_the_gpu():
    check_all("triton", "cuda")


@pytest.mark.gpu
def test_flat_rows_on_the_gpu():
    check_flat_rows(device="cuda")
