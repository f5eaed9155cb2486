"""What an episode cost, as `usage` of OpenAI's interface and as the field `vtengine` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import View
from vtengine.rollout.episode import Episode, ShownImage, Turn
from vtengine.server.cap import SPENT
from vtengine.server.splitter import split_reply

Json = dict[str, Any]
TURN_BREAK = "\n\n"
"""Between the reasoning of two turns."""


def usage(episodes: Sequence[Episode]) -> Json:
    """Tokens of all turns of all choices; a turn's prompt holds the turns before it, from the cache."""
    done = [turn.completion for episode in episodes for turn in episode.turns]
    prompt, written = sum(one.prompt_tokens for one in done), sum(len(one.token_ids) for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in done)},
    }


def account(episode: Episode, limits: Limits) -> Json:
    """The extension field of one choice."""
    turns = episode.turns
    return {
        "status": episode.status,
        "error": None if episode.error is None else episode.error.row(),
        "resolution": limits.resolution,
        "upscaled": episode.is_upscaled,
        "turns": [turn_account(turn, index) for index, turn in enumerate(turns)],
        **_sums([episode]),
    }


def account_of_choices(episodes: Sequence[Episode], limits: Limits) -> Json:
    """The extension field of a whole reply: that of its only choice, or the sums over several."""
    if len(episodes) == 1:
        return account(episodes[0], limits)
    return {"resolution": limits.resolution, "choices": len(episodes), **_sums(episodes)}


def _sums(episodes: Sequence[Episode]) -> Json:
    done = [turn.completion for episode in episodes for turn in episode.turns]
    return {
        "visual_tokens": sum(episode.visual_tokens for episode in episodes),
        "visual_tokens_full": sum(episode.visual_tokens_full for episode in episodes),
        "cached_tokens": sum(one.cached_tokens for one in done),
        "prefill_tokens": sum(one.prefill_tokens for one in done),
        "completion_tokens": sum(len(one.token_ids) for one in done),
        "latency_s": round(max(episode.latency_s for episode in episodes), 6),
    }


def turn_account(turn: Turn, index: int) -> Json:
    completion = turn.completion
    return {
        "turn": index + 1,
        "action": turn.action,
        "finish": completion.finish,
        "views": [_shown(view, image) for view, image in zip(turn.views, turn.images, strict=True)],
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "prefill_tokens": completion.prefill_tokens,
        "completion_tokens": len(completion.token_ids),
        "ttft_s": round(completion.ttft_s, 6),
        "latency_s": round(completion.latency_s, 6),
    }


def view_account(view: View, width: int, height: int, visual_tokens: int) -> Json:
    """image: its number, from 0; width, height: pixels given to the model; `box`: pixels of the low view."""
    made: Json = {"kind": view.kind, "image": view.image, "width": width, "height": height}
    made["visual_tokens"] = visual_tokens
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
