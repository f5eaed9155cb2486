"""What an engine has for those who wait for it, in their event loop. Nothing, once they are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from vtengine.engine.base import OnTokens


def set_result(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def set_error(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def tell(future: asyncio.Future[Any], on_tokens: OnTokens, token_ids: Sequence[int]) -> None:
    """What the function raises ends its own request alone."""
    if future.done():
        return
    try:
        on_tokens(token_ids)
    except Exception as error:
        future.set_exception(error)
