"""A running SGLang server over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.sglang.checks import wrong_model
from vtengine.engine.sglang.hooks import STATE
from vtengine.engine.sglang.reply import NO_SUCH_CALL, raise_for_status
from vtengine.engine.sglang.silence import Patience
from vtengine.engine.sglang.transport import ADDRESS, NOT_OFFERED, ConnectionLost, ServerFacts, ServerUnsuitable
from vtengine.keepalive import KEEP_ALIVE

if TYPE_CHECKING:
    from vtengine.engine.sglang.served import ServedModel

FLUSH_WAIT_S = 2.0
FACTS_S = 60.0
"""Longest silence where a server is asked what it is: its scheduler answers between two batches."""
HEALTH_S = 30.0
"""Longest time that the question for its health may take: SGLang says no after 20 s of a silent scheduler."""
CONTROL_S = 1800.0
"""Longest time that an update of the weights, or a release of memory, may take."""
IMAGE_PAD = "<|image_pad|>"


class HttpTransport:
    """connect_s: limit for the connection; read_s: longest silence of the server, which is asked for its health while
    an answer takes its time."""

    takes_tensors = False
    is_child = False

    def __init__(self, url: str, api_key: str | None, connect_s: float, read_s: float) -> None:
        try:
            import httpx
        except ImportError:
            raise ValueError("--backend URL needs an HTTP client: pip install 'vtengine[sglang]'") from None
        url = url.rstrip("/")
        if not url.startswith(ADDRESS):
            raise ValueError(f"backend {url}: is no http:// or https:// address")
        self._httpx = httpx
        self._facts_timeout = httpx.Timeout(min(read_s, FACTS_S), connect=connect_s, pool=None)
        self._answer_timeout = httpx.Timeout(read_s, connect=connect_s, read=None, pool=None)
        self._health_timeout = httpx.Timeout(min(read_s, HEALTH_S), connect=connect_s, pool=None)
        self._patience = Patience(self._is_healthy, read_s)
        self.where = url
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(read_s, connect=connect_s, pool=None),
            transport=httpx.AsyncHTTPTransport(
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                trust_env=False,
                socket_options=KEEP_ALIVE,  # the server may be healthy, and forgotten by what lies between
            ),
            trust_env=False,
        )

    async def facts(self) -> ServerFacts:
        model, server = await self._json("GET", "/model_info"), await self._json("GET", "/server_info")
        try:
            return server_facts(server, model)
        except KeyError as error:
            raise ServerUnsuitable(f"{self.where}: is no SGLang server: /server_info has no {error}") from None
        except (TypeError, ValueError) as error:
            raise ServerUnsuitable(f"{self.where}: is no SGLang server: what it says of itself: {error}") from None

    async def check_model(self, model: ServedModel) -> None:
        """The server does not say what its vocabulary is, but it refuses a bias for an id that it does not have."""
        image_id = {"tokens": [model.image_token_id], "skip_special_tokens": False}
        text = (await self._json("POST", "/v1/detokenize", image_id)).get("text")
        if text != IMAGE_PAD:
            raise wrong_model(self.where, model, f"id {model.image_token_id} is {text!r} there, not {IMAGE_PAD}")
        if await self._has_id(model.vocab_size):
            raise wrong_model(self.where, model, f"its vocabulary is larger than our {model.vocab_size}")
        if not await self._has_id(model.vocab_size - 1):
            raise wrong_model(self.where, model, f"its vocabulary is smaller than our {model.vocab_size}")

    async def _has_id(self, token_id: int) -> bool:
        sampling = {"max_new_tokens": 1, "temperature": 0, "logit_bias": {str(token_id): 0.0}}
        try:
            async for chunk in self.send({"input_ids": [0], "sampling_params": sampling, "stream": True}):
                if "error" in chunk:
                    return False
        except RequestRejected:
            return False
        return True

    async def send(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        sending = self._client.stream("POST", "/generate", json=payload, timeout=self._answer_timeout)
        heard = self._patience.wait_for
        try:
            async with AsyncExitStack() as stack:
                response = await heard(stack.enter_async_context(sending))
                if response.status_code != 200:
                    body = (await heard(response.aread())).decode("utf-8", "replace")
                    raise_for_status(self.where, response.status_code, _message(body))
                lines = _lines(response)
                while (line := await heard(anext(lines, None))) is not None:
                    if not line:
                        continue
                    if line.removeprefix(b"data:").strip() == b"[DONE]":
                        return
                    yield self._chunk(line)
        except (TimeoutError, self._httpx.TimeoutException) as error:
            raise ConnectionLost(f"{self.where}: no answer in time ({type(error).__name__})") from None
        except self._httpx.TransportError as error:
            raise ConnectionLost(f"{self.where}: connection lost: {str(error) or type(error).__name__}") from None
        raise ConnectionLost(f"{self.where}: the answer broke off")

    async def _is_healthy(self) -> bool:
        """SGLang answers once its scheduler said anything, to whomever; an idle one generates a token for it.

        Its /health can be told to answer without.
        """
        try:
            response = await self._client.get("/health_generate", timeout=self._health_timeout)
        except self._httpx.HTTPError:
            return False
        return bool(response.status_code == 200)

    async def abort(self, rid: str) -> None:
        try:
            await self._client.post("/abort_request", json={"rid": rid}, timeout=5)
        except self._httpx.HTTPError:
            return  # nobody waits for the request any more, and a dead server runs nothing

    async def flush(self) -> bool:
        """The server waits a little for what still runs."""
        response = await self._post("/flush_cache", {}, params={"timeout": FLUSH_WAIT_S})
        if response.status_code in (401, 403):
            raise_for_status(self.where, response.status_code, _message(response.text))
        return bool(response.status_code == 200)

    async def control(self, call: str, **fields: Any) -> tuple[bool, str]:
        body = {name: _in_json(value) for name, value in fields.items()}
        response = await self._post(f"/{call}", body, timeout=CONTROL_S)
        if response.status_code in NO_SUCH_CALL:
            return False, NOT_OFFERED
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "success" not in answer:  # release and resume of memory say nothing
            return bool(response.status_code == 200), _message(response.text)
        return bool(answer["success"]), str(answer.get("message", ""))

    async def set_version(self, version: str) -> None:
        await self._json("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def close(self) -> None:
        await self._patience.close()
        await self._client.aclose()

    def _chunk(self, line: bytes) -> dict[str, Any]:
        try:
            chunk = json.loads(line.removeprefix(b"data:"))
            if isinstance(chunk, dict):
                return chunk
        except ValueError:
            pass
        said = line[:120].decode("utf-8", "replace")
        raise BackendFailed(f"{self.where}: answered with something that is no JSON of SGLang: {said!r}")

    async def _post(self, path: str, body: dict[str, Any], **options: Any) -> Any:
        try:
            return await self._client.post(path, json=body, **options)
        except self._httpx.HTTPError as error:
            raise ConnectionLost(f"{self.where}{path}: {str(error) or type(error).__name__}") from None

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path, json=body, timeout=self._facts_timeout)
        except self._httpx.HTTPError as error:
            message = f"{self.where}: no server answers there ({str(error) or type(error).__name__}); is it running?"
            raise ConnectionLost(message) from None
        if response.status_code == 404:
            raise ServerUnsuitable(f"{self.where}: is no SGLang server, or an old one: it has no {path}")
        if response.status_code != 200:
            raise_for_status(f"{self.where}{path}", response.status_code, _message(response.text))
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerUnsuitable(f"{self.where}: is no SGLang server: {path} gives {response.text[:80]!r}")
        return answer


def server_facts(server: dict[str, Any], model: dict[str, Any]) -> ServerFacts:
    """From /server_info and /model_info. Raises KeyError."""
    return ServerFacts(
        version=str(server["version"]),
        model_path=str(model["model_path"]),
        model_type=model.get("model_type"),
        weight_version=str(model.get("weight_version", "default")),
        incremental=bool(server.get("incremental_streaming_output")),
        skips_tokenizer=bool(server.get("skip_tokenizer_init")),
        radix_cache=not server.get("disable_radix_cache"),
        rl_on_policy_target=server.get("rl_on_policy_target"),
        tp_size=int(server.get("tp_size") or 1),
        hooks=hooks_of(server.get("internal_states")),
    )


def hooks_of(states: Any) -> tuple[str, ...]:
    """Hooks of our plugin that every scheduler of the server reports."""
    if not isinstance(states, list) or not states:
        return ()
    named = [set(state.get(STATE, ())) if isinstance(state, dict) else set() for state in states]
    return tuple(sorted(set.intersection(*named)))


def _in_json(value: Any) -> Any:
    """SGLang's HTTP calls take bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return [_in_json(item) for item in value] if isinstance(value, list) else value


async def _lines(response: Any) -> AsyncGenerator[bytes, None]:
    """Of the body. httpx's own would end one at U+0085 or U+2028 as well, which text inside JSON may hold."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _message(body: str) -> str:
    """The text of an error body, JSON or not."""
    try:
        data = json.loads(body)
    except ValueError:
        return body
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
