"""What every prompt begins with: computed once for all rows; and how short a prompt can be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vtengine.cli.errors import CliError, one_line
from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Part, Text, View, ViewSize
from vtengine.protocol.profile import Profile

if TYPE_CHECKING:
    from vtengine.rollout.group import Setting
    from vtengine.rollout.tokenizer import Tokenizer


class _OneToken:
    """The smallest geometry there is."""

    def size(self, view: View) -> ViewSize:
        return ViewSize(28, 28)


def _first_parts(profile: Profile, limits: Limits) -> tuple[Part, ...]:
    """Of an empty question about an image of one token."""
    ask = Conversation.start("", profile, limits, _OneToken()).ask()
    return () if ask is None else ask.parts


def shortest_prompt(tokenizer: Tokenizer, profile: Profile, limits: Limits) -> int:
    """Tokens, the image's one among them."""
    parts = _first_parts(profile, limits)
    texts = [part for part in parts if isinstance(part, Text)]
    return len(tokenizer.encode(texts)) + len(parts) - len(texts)


async def prefill_beginning(setting: Setting) -> None:
    """Computes what all prompts begin with, so that every row finds it in the cache, the first ones too.

    It also makes the token account of a row independent of the rows before it, as far as images differ.
    """
    from vtengine.engine.base import BackendFailed, Request, RequestRejected, SamplingParams

    texts: list[Text] = []
    for part in _first_parts(setting.profile, setting.limits):
        if not isinstance(part, Text) or not part.trusted:
            break
        texts.append(part)
    token_ids = tuple(setting.tokenizer.encode(texts))
    if not token_ids:
        return
    request = Request("shared prompt", token_ids, (), SamplingParams(max_new_tokens=1))
    engines = getattr(setting.backend, "engines", [setting.backend])
    try:
        await asyncio.gather(*(engine.generate(request) for engine in engines))
    except (BackendFailed, RequestRejected) as error:
        raise CliError(f"the engine cannot run the prompt: {one_line(error)}") from None
