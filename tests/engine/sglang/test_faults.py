"""The HTTP backend and everything that can go wrong on the other side, with a local server that has no model."""

from __future__ import annotations

import asyncio
import socket
import time
from importlib import metadata

import pytest

from tests.engine.sglang.backends import TINY, over_fake_server
from tests.engine.sglang.fake_server import REPLY, FakeSglang
from tests.engine.tiny import PAD, STOP, VIDEO, image, prompt, request, tiny_config
from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.sglang import ServedModel, SglangHttpBackend
from vtengine.engine.sglang import backend as backend_module
from vtengine.engine.sglang.inprocess import installed_version
from vtengine.engine.sglang.reply import raise_for_status
from vtengine.engine.sglang.weights import check_shapes, read_shapes
from vtengine.model import Qwen2_5_VL, hf_tensors, save_model

ASK = request("a", (1, 2, 3), max_new_tokens=6)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backend_module, "RETRY_PAUSE_S", 0.01)


def serve(function, fake=None, **options):
    """Runs an async function of (backend, fake server), closes both."""

    async def main():
        backend = over_fake_server(fake, **options)
        try:
            return await asyncio.wait_for(function(backend, backend.fake), 60)
        finally:
            await backend.close()

    return asyncio.run(main())


def fake(*faults, always=(), **info):
    server = FakeSglang(**info)
    server.faults, server.always = list(faults), set(always)
    return server


def failure(kind, *faults, always=(), ask=ASK, **options):
    """What a request fails with."""
    with pytest.raises(kind) as error:
        serve(lambda backend, _: backend.generate(ask), fake(*faults, always=always), **options)
    return error.value


def test_a_server_that_is_down():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        async def main():
            backend = SglangHttpBackend(url, TINY)
            try:
                await backend.check()
            finally:
                await backend.close()

        with pytest.raises(BackendFailed, match=f"{url}: no server answers there.*is it running"):
            asyncio.run(main())


def test_a_port_that_never_answers(monkeypatch):
    """Something listens there, takes the request and is silent: the start does not wait as long as a generation."""
    monkeypatch.setattr("vtengine.engine.sglang.http.FACTS_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"

        async def main():
            backend = SglangHttpBackend(url, TINY)
            try:
                await asyncio.wait_for(backend.check(), 30)
            finally:
                await backend.close()

        with pytest.raises(BackendFailed, match=f"{url}: no server answers there.*ReadTimeout.*is it running"):
            asyncio.run(main())


def test_something_else_answers_there():
    assert "is no SGLang server" in str(failure(RequestRejected, always={"html"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.info.update(version="0.5.11"), "SGLang 0.5.11"),
        (lambda f: f.model.update(model_type="llava"), "wrong model on the server.*llava"),
        (lambda f: setattr(f, "image_token", 77), "wrong model on the server.*image_pad"),
        (lambda f: setattr(f, "vocab", 300), "wrong model on the server.*larger than our 256"),
        (lambda f: setattr(f, "vocab", 200), "wrong model on the server.*smaller than our 256"),
        (lambda f: f.info.pop("version"), "is no SGLang server"),
        (lambda f: f.info.update(tp_size="many"), "is no SGLang server.*many"),
    ],
)
def test_a_server_that_does_not_suit_is_refused_before_the_first_request(change, words):
    server = fake()
    change(server)
    with pytest.raises(RequestRejected, match=words) as error:
        serve(lambda backend, _: backend.generate(ASK), server)
    assert (error.value.code, error.value.blame) == ("server_unsuitable", "setup") and not server.requests


@pytest.mark.parametrize("fault", ["dies", "queue_full"])
def test_a_lost_connection_before_the_first_token_is_tried_again(fault):
    async def twice(backend, server):
        completion = await backend.generate(ASK)
        return completion, backend.stats(), server.requests

    completion, stats, requests = serve(twice, fake(fault, fault))
    assert completion.token_ids == REPLY[:6] and stats["retries"] == 2 and stats["requests"] == 1
    assert len({sent["rid"] for sent in requests}) == len(requests) == 3


def test_attempts_are_bounded():
    error = failure(BackendFailed, always={"dies"}, attempts=2)
    assert "connection lost" in str(error) or "broke off" in str(error)
    assert "no room now" in str(failure(BackendFailed, always={"queue_full"}))


def test_a_server_that_dies_in_the_middle_is_not_asked_again():
    server = fake("dies_later")
    with pytest.raises(BackendFailed, match=r"connection lost|broke off"):
        serve(lambda backend, _: backend.generate(ASK), server)
    assert len(server.requests) == 1


def test_a_silent_server_runs_into_the_deadline_and_is_told():
    server = fake(always={"silent"})

    async def ask(backend, _):
        await backend.check()
        with pytest.raises(BackendFailed, match=r"not done after 0\.8 s"):
            await backend.generate(ASK)
        while not server.aborted:
            await asyncio.sleep(0.01)

    serve(ask, server, deadline_s=0.8)
    assert server.aborted == [server.requests[0]["rid"]]


@pytest.mark.parametrize("faults", [{"frozen"}, {"silent", "sick"}])
def test_a_frozen_server_is_lost_after_the_limit(faults):
    began_s = time.monotonic()
    assert "no answer in time" in str(failure(BackendFailed, always=faults, read_s=1.0, attempts=1))
    assert 1.0 <= time.monotonic() - began_s < 15


def test_a_server_that_generates_for_longer_than_the_limit_is_waited_for():
    """Its answer comes in two pieces, the first token and the rest, 2 s apart."""
    asks = [request(str(k), (1, 2, k), max_new_tokens=41) for k in range(8)]

    async def ask(backend, _):
        await backend.check()
        return await asyncio.gather(*(backend.generate(one) for one in asks))

    server, began_s = fake(always={"slow"}), time.monotonic()
    done = serve(ask, server, read_s=1.2, attempts=1)
    assert [len(completion.token_ids) for completion in done] == [41] * 8
    assert 1 <= server.health_checks <= (time.monotonic() - began_s) / 0.4 + 1  # not for each request


def test_a_healthy_server_that_does_not_answer_runs_into_the_deadline():
    server = fake(always={"silent"})
    with pytest.raises(BackendFailed, match=r"not done after 2 s"):
        serve(lambda backend, _: backend.generate(ASK), server, read_s=0.9, deadline_s=2)
    assert len(server.requests) == 1


def test_a_deadline_counts_for_slow_tokens_too():
    ask = request("a", (1, 2), max_new_tokens=100)
    assert "deadline_s" in str(failure(BackendFailed, "slow", ask=ask, deadline_s=0.4))


def test_another_prompt_length_names_both():
    error = failure(RequestRejected, always={"miscounts"})
    assert (error.code, error.blame) == ("prompt_mismatch", "setup") and "6 tokens, ours has 3" in str(error)


def test_another_prompt_of_the_same_length_is_found():
    error = failure(RequestRejected, always={"wrong_ids"})
    assert (error.code, error.blame) == ("prompt_mismatch", "setup") and "id 77 at place 2, ours has 3" in str(error)


def test_answers_that_cannot_be_read():
    assert "no JSON of SGLang" in str(failure(BackendFailed, "garbage", attempts=1, ask=ASK) or "")
    assert "logprobs" in str(failure(BackendFailed, always={"no_logprobs"}))


def test_what_the_server_refuses_is_a_rejected_request():
    error = failure(RequestRejected, "refused")
    assert (error.code, error.blame) == ("refused_by_server", "unclear") and "cannot load image" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "blame"),
    [
        (400, "refused_by_server", "unclear"),
        (413, "refused_by_server", "unclear"),
        (404, "refused_by_server", "setup"),
        (401, "not_authorized", "setup"),
    ],
)
def test_an_error_status_says_whose_fault_it_is(status, code, blame):
    with pytest.raises(RequestRejected, match=f"server.*{status}.*why") as error:
        raise_for_status("server", status, "why")
    assert (error.value.code, error.value.blame) == (code, blame)


def test_cancelling_tells_the_server():
    async def cancel(backend, server):
        await backend.check()
        task = asyncio.create_task(backend.generate(request("a", (1, 2), max_new_tokens=100)))
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not server.aborted:
            await asyncio.sleep(0.01)
        return server.requests[0]["rid"], server.aborted

    rid, aborted = serve(cancel, fake("slow"))
    assert aborted == [rid]


def test_a_request_aborted_by_somebody_else_is_cancelled():
    async def abort(backend, server):
        await backend.check()
        task = asyncio.create_task(backend.generate(request("a", (1, 2), max_new_tokens=40)))
        while not server.requests:
            await asyncio.sleep(0.01)
        server.aborted.append(server.requests[0]["rid"])
        return await task

    server = fake()
    server.token_s = 0.02
    assert serve(abort, server).finish == "cancelled"


@pytest.mark.parametrize("incremental", [False, True])
def test_both_ways_of_streaming(incremental):
    async def collect(backend, _):
        chunks = []
        return await backend.generate(ASK, chunks.append), chunks

    completion, chunks = serve(collect, fake(incremental_streaming_output=incremental))
    assert sum(chunks, ()) == completion.token_ids == REPLY[:6]
    assert len(chunks) == 6 and len(completion.logprobs) == 6
    completion, chunks = serve(collect, fake(incremental_streaming_output=incremental), max_chunks_per_s=1e-3)
    assert chunks == [REPLY[:1], REPLY[1:6]] and completion.token_ids == REPLY[:6]


def test_the_key_is_sent_and_an_id_is_served_once():
    async def two(backend, server):
        asks = [backend.generate(ASK), backend.generate(ASK)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        return [type(result).__name__ for result in results], server.headers

    kinds, headers = serve(two, api_key="secret")
    assert sorted(kinds) == ["Completion", "RequestRejected"]
    assert all(header["Authorization"] == "Bearer secret" for header in headers)


# ---- weights (more in test_updates.py) -------------------------------------------------------------------------------


def test_a_server_that_came_back_with_old_weights_is_noticed():
    async def restart(backend, server):
        await backend.load_weights({}, 3)
        server.model["weight_version"] = "default"
        with pytest.raises(BackendFailed, match=r"weights 'default', version 3 was loaded.*load the weights again"):
            await backend.generate(ASK)

    serve(restart)


def test_weights_that_do_not_fit_are_refused_here(tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match=r"model\.norm\.weight \[3\] \(ours: \[64\]\)"):
        check_shapes({"model.norm.weight": (3,)}, config, "here")
    with pytest.raises(ValueError, match=r"names of transformers 5.*save_model"):
        check_shapes({"model.language_model.norm.weight": (64,)}, config, "here")
    with pytest.raises(ValueError, match="1 tensors do not fit"):
        check_shapes({"nonsense": (64,)}, config, "here")
    with pytest.raises(ValueError, match="holds no"):
        read_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        read_shapes(tmp_path)
    model = Qwen2_5_VL.build(config, 0)
    save_model(model, tmp_path)
    shapes = read_shapes(tmp_path)
    assert set(shapes) == set(hf_tensors(model))
    check_shapes(shapes, config, "here")


# ---- options and environment ----------------------------------------------------------------------------------------


def test_bad_options():
    for options, words in (
        ({"attempts": 0}, "attempts = 0"),
        ({"deadline_s": 0}, "deadline_s = 0"),
        ({"max_chunks_per_s": 0}, "max_chunks_per_s = 0"),
    ):
        with pytest.raises(ValueError, match=words):
            SglangHttpBackend("http://127.0.0.1:1", TINY, **options)
    with pytest.raises(ValueError, match="no http"):
        SglangHttpBackend("127.0.0.1:1", TINY)


@pytest.mark.parametrize(("found", "words"), [(None, "not installed.*make sglang-venv"), ("0.5.3", "SGLang 0.5.3")])
def test_sglang_missing_or_old(monkeypatch, found, words):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("vtengine.engine.sglang.inprocess.version", version)
    with pytest.raises(ValueError, match=words):
        installed_version()


def test_images_beyond_the_cached_prefix_count_as_encoded():
    low, high = image(1), image(2, h=6, w=8)
    first = prompt(1, 20, [low])

    async def ask(backend, _):
        await backend.generate(request("one", first, [low], stop_token_ids=(STOP,)))
        ids = [*first, 9, 253, *[PAD] * high.visual_tokens, 254]
        return await backend.generate(request("two", ids, [low, high]))

    assert serve(ask).images_encoded == (False, True)


def test_a_closed_backend_says_so():
    async def closed():
        backend = SglangHttpBackend("http://127.0.0.1:9", ServedModel("m", 256, PAD, VIDEO))
        await backend.close()
        with pytest.raises(BackendFailed, match="closed"):
            await backend.generate(ASK)

    asyncio.run(closed())
