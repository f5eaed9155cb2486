"""What both ways to reach SGLang have in common, and the faults they raise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vtengine.engine.base import BackendFailed, RequestRejected

if TYPE_CHECKING:
    from vtengine.engine.sglang.served import ServedModel


class ConnectionLost(BackendFailed):
    """Nothing, or not everything, came back: the request may be sent again."""


class ServerUnsuitable(RequestRejected):
    """The server cannot serve us whatever is asked: another version, another model, other settings."""

    def __init__(self, message: str) -> None:
        super().__init__("server_unsuitable", message)


@dataclass(frozen=True)
class ServerFacts:
    """What SGLang says about itself. incremental: streamed chunks hold new ids only, not all since the start."""

    version: str
    model_path: str
    model_type: str | None
    weight_version: str
    incremental: bool = False
    deterministic: bool = False
    skips_tokenizer: bool = False
    radix_cache: bool = True
    rl_on_policy_target: str | None = None


class Transport(Protocol):
    """One SGLang. `where` names it in messages. takes_tensors: images go as processor output, else as PNG."""

    where: str
    takes_tensors: bool

    async def facts(self) -> ServerFacts:
        """Raises ConnectionLost, or ServerUnsuitable for what is no SGLang."""
        ...

    async def check_model(self, model: ServedModel) -> None:
        """Raises ServerUnsuitable where vocabulary or image id are not those of our checkpoint."""
        ...

    def send(self, payload: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Chunks of /generate. Raises ConnectionLost, BackendFailed, RequestRejected."""
        ...

    async def abort(self, rid: str) -> None: ...

    async def flush(self) -> bool:
        """Whether the radix cache is empty now; False while something still runs."""
        ...

    async def update_from_disk(self, folder: Path, version: str) -> tuple[bool, str]: ...

    async def set_version(self, version: str) -> None:
        """Names the weights that are loaded already."""
        ...

    async def close(self) -> None: ...
