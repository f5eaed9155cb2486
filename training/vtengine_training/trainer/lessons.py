"""Replies that are written from the rows' own answers instead of sampled: what `loss.algorithm = "sft"` learns from.

They take the place of the engine's in the one episode loop, so prompts, views and token ids are those of inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vtengine.engine.base import RequestRejected
from vtengine.engine.scripted import ScriptedBackend
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import Profile
from vtengine.protocol.reply import parse_reply
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.group import Setting
from vtengine_training.data.examples import Example
from vtengine_training.sft.tokenizer import THINK_FIRST, THINK_LARGE


def lessons(example: Example, profile: Profile, limits: Limits) -> list[tuple[str, ...]]:
    """The episodes that a row teaches, each as its replies: the first accepted answer at once, or behind a call for the
    high view. `needs_high` of the row says which; without it both. Where no call is possible, at once.

    The row's `think` is what is thought before the answer; without it, a few fixed words. A row with `replies`, a list
    of texts, teaches these, one for each turn, and nothing else (none at all where it is no such list).
    """
    if (written := example.fields.get("replies")) is not None:
        texts = isinstance(written, list) and all(isinstance(text, str) for text in written)
        return [tuple(written) if texts else ()]
    think, needs_high = example.fields.get("think"), example.fields.get("needs_high")
    own = think if isinstance(think, str) and think.strip() else None
    at_once = (profile.reply_answer(own or THINK_FIRST, example.answers[0]),)
    closer = profile.reply_call(THINK_FIRST, RESIZE_CALL), profile.reply_answer(own or THINK_LARGE, example.answers[0])
    if limits.num_turns < 2 or RESIZE_CALL.name not in profile.offered:
        return [at_once]
    return [
        one for one, wanted in ((at_once, False), (closer, True)) if needs_high not in (0, 1) or needs_high == wanted
    ]


def taught(setting: Setting, replies: tuple[str, ...]) -> Setting:
    """The setting with a backend that gives these replies. Its log-probabilities are 0 and mean nothing.

    Rows whose replies would not be read back as they are meant, or are too long, are rejected with the reason.
    """
    fault = _unfit_number(replies, setting.limits) or next(_faults(replies, setting), None)
    return replace(setting, backend=ScriptedBackend(setting.tokenizer, [fault] if fault else replies, logprob=0.0))


def _unfit_number(replies: tuple[str, ...], limits: Limits) -> RequestRejected | None:
    """Whether a conversation would not come to each of them."""
    if not replies:
        return RequestRejected("reply_unfit", "replies must be a list of texts, at least one")
    if len(replies) > limits.num_turns:
        remedy = "raise rollout.max_turns" if limits.resolution == "adaptive" else 'rollout.resolution = "adaptive"'
        words = f"the row has {len(replies)} replies, an episode here at most {limits.num_turns}: {remedy}"
        return RequestRejected("reply_unfit", words)
    return None


def _faults(replies: tuple[str, ...], setting: Setting) -> Iterator[RequestRejected]:
    """Replies that would be read as something else, do not belong where they stand, or are too long."""
    room = setting.sampling.max_new_tokens
    for number, text in enumerate(replies, start=1):
        reply, is_last = parse_reply(text, setting.profile.offered), number == len(replies)
        ids = setting.tokenizer.encode_trusted(text)
        if reply.error is not None or reply.flaws:
            what = reply.error.message if reply.error is not None else ", ".join(reply.flaws)
            yield RequestRejected("reply_unfit", f"a reply would not be read as it is meant: {what}")
        elif (reply.call is None) != is_last:
            wanted = "the last one must answer" if is_last else "all but the last must call for a view"
            yield RequestRejected("reply_unfit", f"reply {number} of {len(replies)}: {wanted}")
        elif not setting.tokenizer.special_ids.isdisjoint(ids):
            yield RequestRejected("reply_unfit", "a reply spells a special token")
        elif len(ids) >= room:
            words = f"the reply has {len(ids) + 1} tokens, rollout.max_new_tokens = {room}: raise it"
            yield RequestRejected("reply_too_long", words)
