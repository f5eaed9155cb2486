"""What a reply of the model says: an answer, a call, or neither. Tags are exact; nothing is repaired."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vtengine.protocol.messages import ErrorInfo
from vtengine.protocol.tools import CallError, ToolCall, parse_call

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
CALL = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Reply:
    """Exactly one of `answer`, `call` and `error` is set.

    flaws: departures from the taught format that do not stop the reply from being used (training scores them):
    think_missing, think_repeated, tags_in_think, text_before_think, text_after_answer.
    is_bad_call: the error is a call that cannot be obeyed (a profile may let the model try again).
    """

    think: str | None = None
    answer: str | None = None
    call: ToolCall | None = None
    error: ErrorInfo | None = None
    is_bad_call: bool = False
    flaws: tuple[str, ...] = ()


def parse_reply(text: str, offered: Mapping[str, Collection[str]] | None = None) -> Reply:
    """Reads one reply. `offered`: the tools of the prompt (see parse_call); an empty mapping allows no call.

    Tags inside the first <think>...</think> are thought, not deed. Error codes: those of parse_call, and
    answer_missing, answer_empty, answer_unclosed, answers_many, answer_and_call, call_unclosed, calls_many,
    text_after_call, tool_not_offered, think_unclosed.
    """
    think, body, flaws = _split_think(text)
    if think is None and THINK[0] in body:
        return Reply(error=ErrorInfo("think_unclosed", "the reply ends inside its thought"), flaws=flaws)
    num_answers, num_calls = _count(body, ANSWER), _count(body, CALL)
    if num_answers and num_calls:
        return Reply(think, error=ErrorInfo("answer_and_call", "a reply answers or calls, not both"), flaws=flaws)
    if num_calls:
        return _read_call(think, body, num_calls, offered, flaws)
    if num_answers:
        return _read_answer(think, body, num_answers, flaws)
    return Reply(think, error=ErrorInfo("answer_missing", "the reply holds neither an answer nor a call"), flaws=flaws)


def _split_think(text: str) -> tuple[str | None, str, tuple[str, ...]]:
    opening, closing = THINK
    start, end = text.find(opening), text.find(closing)
    if start < 0 or end < start:
        return None, text, ("think_missing",)
    think, before, after = text[start + len(opening) : end], text[:start], text[end + len(closing) :]
    if any(tag in before for tag in ANSWER + CALL):
        return None, before + after, ("text_before_think",)
    flaws = []
    if before.strip():
        flaws.append("text_before_think")
    if any(tag in think for tag in ANSWER + CALL + THINK[:1]):
        flaws.append("tags_in_think")
    if any(tag in after for tag in THINK):
        flaws.append("think_repeated")
    return think, after, tuple(flaws)


def _count(body: str, tags: tuple[str, str]) -> int:
    return max(body.count(tags[0]), body.count(tags[1]))


def _read_answer(think: str | None, body: str, num_answers: int, flaws: tuple[str, ...]) -> Reply:
    if num_answers > 1:
        return Reply(think, error=ErrorInfo("answers_many", f"{num_answers} answers"), flaws=flaws)
    start, end = body.find(ANSWER[0]), body.find(ANSWER[1])
    if start < 0 or end < start:
        return Reply(think, error=ErrorInfo("answer_unclosed", "an answer tag has no partner"), flaws=flaws)
    if body[end + len(ANSWER[1]) :].strip():
        flaws += ("text_after_answer",)
    answer = body[start + len(ANSWER[0]) : end].strip()
    if not answer:
        return Reply(think, error=ErrorInfo("answer_empty", "the answer holds no text"), flaws=flaws)
    return Reply(think, answer=answer, flaws=flaws)


def _read_call(
    think: str | None,
    body: str,
    num_calls: int,
    offered: Mapping[str, Collection[str]] | None,
    flaws: tuple[str, ...],
) -> Reply:
    try:
        if offered is not None and not offered:
            raise CallError("tool_not_offered", "no tool is offered here")
        if num_calls > 1:
            raise CallError("calls_many", f"{num_calls} calls; one is allowed")
        start, end = body.find(CALL[0]), body.find(CALL[1])
        if start < 0 or end < start:
            raise CallError("call_unclosed", "a call tag has no partner")
        if body[end + len(CALL[1]) :].strip():
            raise CallError("text_after_call", "the call ends the reply")
        return Reply(think, call=parse_call(body[start + len(CALL[0]) : end], offered), flaws=flaws)
    except CallError as error:
        return Reply(think, error=ErrorInfo(error.code, str(error)), is_bad_call=True, flaws=flaws)
