"""Siblings read their common pages once: found in every step, whatever comes and goes, and without changing a bit."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vtengine_kernels.prefix_attention import Crossover, native

from tests.engine.harness import run, settle
from tests.engine.tiny import image, prompt, request, tiny_model
from vtengine.engine.embedded import attention
from vtengine.engine.embedded.families import Families

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
MODEL = tiny_model()


@pytest.fixture
def watched(monkeypatch):
    """Every call of the decode kernel: what it was told of siblings is true, and makes no difference. Tokens shared."""
    seen = []
    kernel = attention.prefix_attention

    def checked(q, keys, values, tables, lengths, siblings):
        out = kernel(q, keys, values, tables, lengths, siblings)
        if siblings is None:
            return out
        order, shared = siblings.order.tolist(), siblings.shared.tolist()
        for before, row, tokens in zip(order, order[1:], shared[1:], strict=False):
            pages = min(tokens, int(lengths[before]), int(lengths[row])) // keys.shape[1]
            assert torch.equal(tables[before, :pages], tables[row, :pages])
        assert torch.equal(out, kernel(q, keys, values, tables, lengths))
        seen.append(sum(shared))
        return out

    monkeypatch.setattr(attention, "prefix_attention", checked)
    return seen


def asks(name, count, ids, images=(), new=6):
    return [request(f"{name}{k}", ids, images, max_new_tokens=new, temperature=1.0, seed=k) for k in range(count)]


def test_siblings_share_and_sample_as_they_do_alone(watched):
    picture = image(1, h=8, w=12)
    requests = asks("s", 6, prompt(1, 150, [picture]), [picture]) + asks("t", 2, prompt(2, 90))

    def sampled(share):
        completions = run(
            lambda engine: asyncio.gather(*map(engine.generate, requests)), model=MODEL, share_prefix=share
        )
        return [c.token_ids for c in completions]

    told = sampled(True)
    assert max(watched) >= 5 * 168 + 88
    watched.clear()
    assert sampled(False) == told
    assert not watched
    alone = [run(lambda engine, ask=ask: engine.generate(ask), model=MODEL).token_ids for ask in requests[:2]]
    assert told[:2] == alone


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes(seed, watched):
    """Groups, second turns of some, cancelled ones, and a pool so small that rows are preempted and pages evicted."""
    chance = random.Random(seed)

    async def crowd(engine):
        async def episode(ask):
            await asyncio.sleep(chance.random() / 20)
            if chance.random() < 0.2:
                asyncio.get_running_loop().call_later(chance.random() / 20, engine.cancel, ask.request_id)
            first = await engine.generate(ask)
            if chance.random() < 0.5:
                ids = [*ask.token_ids, *first.token_ids, *prompt(chance.randrange(3), chance.randint(1, 30))]
                await engine.generate(request(f"{ask.request_id}-2", ids, max_new_tokens=5))

        groups = [asks(f"g{g}-", 5, prompt(g % 3, 70 + 20 * g), new=chance.randint(3, 14)) for g in range(4)]
        await asyncio.gather(*(episode(ask) for group in groups for ask in group))
        await settle(engine)
        return engine.stats()

    stats = run(crowd, model=MODEL, share_prefix=True, num_pages=95, max_batch_tokens=48)
    assert stats["preemptions"] + stats["pages_evicted"] > 0
    assert len(watched) > 10 and max(watched) >= 64


def test_found_anew_only_when_other_rows_run(monkeypatch):
    found = []
    families = Families(4, Crossover())
    of = attention.Siblings.of
    monkeypatch.setattr(attention.Siblings, "of", staticmethod(lambda *a: found.append(1) or of(*a)))
    a, b, c = [1, 2, 3], [1, 2, 4], [9]
    assert families.of([a, b, c]).shared.tolist() == [0, 8, 0]
    a.append(5)
    b.append(6)
    first = families.of([a, b, c])
    assert len(found) == 1
    assert families.of([a, c]) is None and families.of([a, c]) is None
    assert len(found) == 2
    assert families.of([a, b, c]).shared.tolist() == first.shared.tolist()
    assert families.of([a, [1, 7], c]).shared.tolist() == [0, 4, 0]  # admitted again, with other pages
    families.forget()
    families.of([a, [1, 7], c])
    assert len(found) == 5


def test_sharing_is_off_where_nobody_measured(monkeypatch):
    keys = torch.zeros(2, 4, 2, 16)
    monkeypatch.setattr(Crossover, "measured", staticmethod(lambda impl: None))
    assert Families.for_cache(keys, 4, None).of([[1, 2], [1, 2]]) is None
    monkeypatch.setattr(
        Crossover, "measured", staticmethod(lambda impl: Crossover((2,), (8,)) if impl == "cpu" else None)
    )
    assert Families.for_cache(keys, 4, None).of([[1, 2], [1, 2]]) is not None
    assert Families.for_cache(keys, 4, None).of([[1, 2], [1, 3]]) is None
    assert Families.for_cache(keys, 4, False).of([[1, 2], [1, 2]]) is None


def test_a_table_is_renewed_when_its_sequence_was_admitted_again():
    """With as many pages, in the same slot: it was preempted and came back within one step."""

    async def renewed(engine):
        runner = engine.runner
        sequence = SimpleNamespace(slot=0, pages=[5, 6])
        assert runner._sync(sequence) == 0
        sequence.pages += [7]
        runner._sync(sequence)
        assert runner._tables[0, :3].tolist() == [5, 6, 7]
        sequence.pages = [5, 8, 9]
        runner._sync(sequence)
        return np.array(runner._tables[0, :3])

    assert run(renewed).tolist() == [5, 8, 9]
