"""What an episode cost, as `usage` of OpenAI's interface and as the field `vtengine` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import HIGH, LOW, View
from vtengine.rollout.episode import Episode, ShownImage, Turn
from vtengine.server.cap import SPENT
from vtengine.server.splitter import split_reply

Json = dict[str, Any]
TURN_BREAK = "\n\n"
"""Between the reasoning of two turns."""


def usage(turns: Sequence[Turn]) -> Json:
    """Tokens of all turns; a turn's prompt holds the turns before it, from the cache."""
    prompt = sum(turn.completion.prompt_tokens for turn in turns)
    written = sum(len(turn.completion.token_ids) for turn in turns)
    cached = sum(turn.completion.cached_tokens for turn in turns)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def account(episode: Episode, limits: Limits) -> Json:
    """The extension field."""
    turns = episode.turns
    return {
        "status": episode.status,
        "error": None if episode.error is None else asdict(episode.error),
        "resolution": limits.resolution,
        "upscaled": episode.is_upscaled,
        "turns": [turn_account(turns, index, limits) for index in range(len(turns))],
        "visual_tokens": episode.visual_tokens,
        "visual_tokens_full": episode.visual_tokens_full,
        "cached_tokens": sum(turn.completion.cached_tokens for turn in turns),
        "prefill_tokens": sum(turn.completion.prefill_tokens for turn in turns),
        "completion_tokens": sum(len(turn.completion.token_ids) for turn in turns),
        "latency_s": round(episode.latency_s, 6),
    }


def turn_account(turns: Sequence[Turn], index: int, limits: Limits) -> Json:
    turn, completion = turns[index], turns[index].completion
    return {
        "turn": index + 1,
        "action": turn.action,
        "finish": completion.finish,
        "views": [_shown(shown_view(turns, index, limits), image) for image in turn.images],
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "prefill_tokens": completion.prefill_tokens,
        "completion_tokens": len(completion.token_ids),
        "ttft_s": round(completion.ttft_s, 6),
        "latency_s": round(completion.latency_s, 6),
    }


def shown_view(turns: Sequence[Turn], index: int, limits: Limits) -> View:
    """The view that turn `index` (from 0) brought, if it brought one: the first, or what the turn before asked for."""
    if index == 0:
        return HIGH if limits.resolution == "high" else LOW
    call = turns[index - 1].reply.call
    return call.view if call is not None else LOW


def view_account(view: View, width: int, height: int, visual_tokens: int) -> Json:
    """width, height: pixels given to the model; `box`: pixels of the low view."""
    made: Json = {"kind": view.kind, "width": width, "height": height, "visual_tokens": visual_tokens}
    if view.scale is not None:
        made["scale"] = float(view.scale)
    if view.box is not None:
        made["box"] = list(view.box)
    return made


def _shown(view: View, image: ShownImage) -> Json:
    return {**view_account(view, image.width, image.height, image.visual_tokens), "encoded": image.encoded}


def finish_reason(episode: Episode) -> str:
    """ "length" when a limit on tokens or turns ended the episode, else "stop"."""
    return "length" if episode.status in ("truncated", "turn_limit") or is_spent(episode) else "stop"


def is_spent(episode: Episode) -> bool:
    """max_tokens ran out between two turns; the episode calls that rejected, OpenAI's interface calls it length."""
    return episode.error is not None and episode.error.code == SPENT


def plain_answer(episode: Episode) -> str:
    """The text of a last reply that holds neither answer nor call: a model without the protocol answers like that."""
    if episode.status != "malformed" or episode.error is None or episode.error.code != "answer_missing":
        return ""
    return body_after_thought(episode.turns[-1].text)


def body_after_thought(text: str) -> str:
    thought, closing, body = text.partition("</think>")
    return (body if closing else thought).strip()


def whole_reply(episode: Episode) -> tuple[str, str]:
    """(reasoning of all turns, content)."""
    parts = [split_reply(turn.text) for turn in episode.turns]
    content = "".join(content for _, content in parts) or plain_answer(episode)
    return TURN_BREAK.join(reasoning for reasoning, _ in parts if reasoning), content
