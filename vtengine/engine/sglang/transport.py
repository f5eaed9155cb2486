"""What both ways to reach SGLang have in common, and the faults they raise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vtengine.engine.base import BackendFailed, RequestRejected

if TYPE_CHECKING:
    from vtengine.engine.sglang.served import ServedModel

ADDRESS = ("http://", "https://")
"""How the address of a server begins."""
NOT_OFFERED = "not offered by this version of SGLang"


class ConnectionLost(BackendFailed):
    """Nothing, or not everything, came back: the request may be sent again."""


class NoRoom(ConnectionLost):
    """The server lives, but takes nothing more at the moment."""


class StaleWeights(BackendFailed):
    """The server lives, with other weights than it should have."""


class ServerUnsuitable(RequestRejected):
    """The server cannot serve us whatever is asked: another version, another model, other settings."""

    def __init__(self, message: str) -> None:
        super().__init__("server_unsuitable", message, "setup")


@dataclass(frozen=True)
class ServerFacts:
    """What SGLang says about itself. incremental: streamed chunks hold new ids only, not all since the start.
    hooks: of our plugin, those at work there."""

    version: str
    model_path: str
    model_type: str | None
    weight_version: str
    incremental: bool = False
    skips_tokenizer: bool = False
    radix_cache: bool = True
    rl_on_policy_target: str | None = None
    tp_size: int = 1
    hooks: tuple[str, ...] = ()


class Transport(Protocol):
    """One SGLang. `where` names it in messages. takes_tensors: images go as processor output, else as PNG.
    is_child: its scheduler is a child process of this one."""

    where: str
    takes_tensors: bool
    is_child: bool

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

    async def control(self, call: str, **fields: Any) -> tuple[bool, str]:
        """A call of SGLang about its weights or its memory, by its name there: whether it worked, and what it said.

        (False, NOT_OFFERED) where this version has no such call. Raises ConnectionLost.
        """
        ...

    async def set_version(self, version: str) -> None:
        """Names the weights that are loaded already."""
        ...

    async def close(self) -> None: ...
