"""The backends by where SGLang is: in this process, at an address, at several addresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vtengine.engine.sglang.backend import SglangBackend
from vtengine.engine.sglang.fleet import SglangFleet
from vtengine.engine.sglang.router import workers_of
from vtengine.engine.sglang.served import ServedModel
from vtengine.engine.sglang.transport import ADDRESS


def addresses(name: str) -> list[str]:
    """Of `http://a:30000,http://b:30000`. Raises ValueError for what is no list of addresses."""
    found = [address.strip().rstrip("/") for address in name.split(",") if address.strip()]
    if not found or any(not address.startswith(ADDRESS) for address in found):
        raise ValueError(f"backend {name}: is no http:// or https:// address, nor several of them with commas between")
    for address in found:
        try:
            _ = urlsplit(address).port
        except ValueError as error:
            raise ValueError(f"backend {name}: {error}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"backend {name}: names an address twice")
    return found


def resolve(name: str, api_key: str | None = None, connect_s: float = 10.0) -> list[str]:
    """The servers' own addresses: as named, or the workers of the sglang-router that is named. Raises ValueError."""
    named = addresses(name)
    if len(named) == 1:
        named = workers_of(named[0], api_key, connect_s) or named
    return named


def connect_servers(
    name: str,
    model: str | Path,
    *,
    api_key: str | None = None,
    connect_s: float = 10.0,
    max_chunks_per_s: float | None = None,
    **options: Any,
) -> SglangHttpBackend | SglangFleet:
    """name: an address, several with commas between, or that of an sglang-router, which stands for its workers.

    max_chunks_per_s: of all servers together. Other options: of `SglangHttpBackend`. Raises ValueError.
    """
    served = ServedModel.from_folder(model)
    named = resolve(name, api_key, connect_s)
    share = None if max_chunks_per_s is None else max_chunks_per_s / len(named)
    both: dict[str, Any] = {"api_key": api_key, "connect_s": connect_s, "max_chunks_per_s": share}
    servers = [SglangHttpBackend(address, served, **both, **options) for address in named]
    return servers[0] if len(servers) == 1 else SglangFleet(servers)


class SglangHttpBackend(SglangBackend):
    """A running SGLang server. model: what it serves, as `ServedModel` or the folder of the checkpoint.

    connect_s: limit for the connection, read_s: longest silence of the server, asked for its health. Other options:
    `SglangBackend`.
    """

    def __init__(
        self,
        url: str,
        model: ServedModel | str | Path,
        *,
        api_key: str | None = None,
        connect_s: float = 10.0,
        read_s: float = 300.0,
        **options: Any,
    ) -> None:
        from vtengine.engine.sglang.http import HttpTransport

        served = model if isinstance(model, ServedModel) else ServedModel.from_folder(model)
        super().__init__(HttpTransport(url, api_key, connect_s, read_s), served, **options)


class SglangEngineBackend(SglangBackend):
    """SGLang in this process (its scheduler is a process of its own, and takes this one down when it dies).

    arguments: of `sglang.Engine` by name, over those that we set; raises ValueError for others. updatable: new weights
    will be loaded, so SGLang's feature cache is off. Other options: `SglangBackend`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        updatable: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from vtengine.engine.sglang.inprocess import EngineTransport

        served = ServedModel.from_folder(folder)
        transport = EngineTransport(Path(folder), device, dtype, updatable, dict(arguments or {}))
        super().__init__(transport, served, vision_cache_off=updatable, **options)
