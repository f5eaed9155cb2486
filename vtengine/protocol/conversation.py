"""The conversation as a pure, immutable state machine: what is asked, what a reply leads to. No tokens, no pixels.

conversation = Conversation.start(question, profile, Limits())
while (ask := conversation.ask()) is not None:
    conversation = conversation.after(reply_text, finish)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from vtengine.protocol.messages import (
    HIGH,
    LOW,
    RESOLUTIONS,
    Ask,
    ErrorInfo,
    Exchange,
    Geometry,
    ImagePart,
    Part,
    Resolution,
    Status,
    Text,
    View,
    merged,
)
from vtengine.protocol.profile import Profile, fill, pieces
from vtengine.protocol.reply import Reply, parse_reply

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Limits:
    """resolution: adaptive offers the tools; low and high are one direct turn. max_turns counts replies.

    visual_token_budget: the most visual tokens an episode may show, the first view included; None = no limit.
    max_context_tokens: the most tokens of prompt and replies together, for whoever counts tokens; None = no limit.
    """

    resolution: Resolution = "adaptive"
    max_turns: int = 2
    visual_token_budget: int | None = None
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"limits.resolution = {self.resolution!r}: must be one of {', '.join(RESOLUTIONS)}")
        if self.max_turns < 1:
            raise ValueError(f"limits.max_turns = {self.max_turns}: must be >= 1")
        for name in ("visual_token_budget", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"limits.{name} = {value}: must be >= 1, or left out")

    @property
    def is_adaptive(self) -> bool:
        return self.resolution == "adaptive"

    @property
    def num_turns(self) -> int:
        """Replies allowed: a direct prompt has one."""
        return self.max_turns if self.is_adaptive else 1


class Situation(Enum):
    OPEN = "another turn may follow"
    LAST = "no other turn may follow"


class Event(Enum):
    ANSWER = "the reply answers"
    GRANT = "the reply calls for a view that it may have"
    DENY = "the reply calls for a view that it may not have"
    RETRY = "the call cannot be obeyed, and the profile lets the model try again"
    MALFORMED = "the reply cannot be used"
    CUT = "the reply reached its length limit"
    BROKEN = "the backend gave up or was stopped"


class Then(Enum):
    VIEW = "show the view"
    DENIAL = "say why there is no view"
    CORRECTION = "say what is wrong with the call"


TRANSITIONS: Mapping[tuple[Situation, Event], Then | Status] = {
    (Situation.OPEN, Event.ANSWER): "answered",
    (Situation.OPEN, Event.GRANT): Then.VIEW,
    (Situation.OPEN, Event.DENY): Then.DENIAL,
    (Situation.OPEN, Event.RETRY): Then.CORRECTION,
    (Situation.OPEN, Event.MALFORMED): "malformed",
    (Situation.OPEN, Event.CUT): "truncated",
    (Situation.OPEN, Event.BROKEN): "failed",
    (Situation.LAST, Event.ANSWER): "answered",
    (Situation.LAST, Event.GRANT): "turn_limit",
    (Situation.LAST, Event.DENY): "turn_limit",
    (Situation.LAST, Event.RETRY): "malformed",
    (Situation.LAST, Event.MALFORMED): "malformed",
    (Situation.LAST, Event.CUT): "truncated",
    (Situation.LAST, Event.BROKEN): "failed",
}


@dataclass(frozen=True)
class Conversation:
    """One episode's state. `turn`: replies so far. `views`: every view shown, in order. `replies`: what each one said.

    Exactly one of `pending` (the next ask's parts) and `status` is set.
    """

    question: str
    profile: Profile
    limits: Limits
    geometry: Geometry | None = None
    turn: int = 0
    views: tuple[View, ...] = ()
    replies: tuple[Reply, ...] = ()
    pending: tuple[Part, ...] | None = None
    status: Status | None = None
    answer: str | None = None
    error: ErrorInfo | None = None
    history: tuple[Exchange, ...] = ()

    @classmethod
    def start(
        cls,
        question: str,
        profile: Profile,
        limits: Limits | None = None,
        geometry: Geometry | None = None,
        history: tuple[Exchange, ...] = (),
    ) -> Conversation:
        """The first ask is ready, or the status is already `rejected` (the first view is over the budget).

        history: what was asked about the same image before; the image stands with the first question.

        geometry: needed for a budget, for a crop's bounds, and by profiles that state view sizes; ValueError if
        it is missing then.
        """
        limits = limits or Limits()
        view = HIGH if limits.resolution == "high" else LOW
        start = cls(question, profile, limits, geometry, views=(view,), history=history)
        budget = limits.visual_token_budget
        if budget is not None and start.visual_tokens > budget:
            message = f"the {view.kind} view alone has {start.visual_tokens} visual tokens, the budget is {budget}"
            return start._close("rejected", ErrorInfo("visual_budget_too_small", message))
        return replace(start, pending=start._opening(view))

    @property
    def visual_tokens(self) -> int:
        """Visual tokens shown so far. Raises ValueError without geometry."""
        return sum(self._cost(view) for view in self.views)

    @property
    def is_upscaled(self) -> bool:
        """A closer view was shown after the first one."""
        return len(self.views) > 1

    def ask(self) -> Ask | None:
        """What to append and send, or None once the status is set. Pure: asking twice gives the same."""
        return None if self.pending is None else Ask(self.pending, self.turn)

    def after(self, text: str, finish: Finish = "stop") -> Conversation:
        """The state after the model's reply (its text without the closing mark). Every bad reply is a status."""
        assert self.status is None, f"the conversation has ended: {self.status}"
        event, reply = self._classify(text, finish)
        situation = Situation.OPEN if self.turn + 1 < self.limits.num_turns else Situation.LAST
        then = TRANSITIONS[situation, event]
        after = replace(self, turn=self.turn + 1, replies=(*self.replies, reply), pending=None)
        if isinstance(then, Then):
            return after._continue(then, reply)
        if then == "answered":
            return replace(after, status=then, answer=reply.answer)
        return after._close(then, reply.error or ErrorInfo("turn_limit", f"a call in the last of {after.turn} turns"))

    def failed(self, error: ErrorInfo, status: Status = "failed") -> Conversation:
        """Ended from outside: no reply came (backend fault, no room in the context, a view that cannot be made)."""
        return self._close(status, error)

    def _close(self, status: Status, error: ErrorInfo) -> Conversation:
        return replace(self, pending=None, status=status, error=error)

    def _classify(self, text: str, finish: Finish) -> tuple[Event, Reply]:
        if finish in ("cancelled", "error"):
            error = ErrorInfo(f"generation_{finish}", f"the backend ended the reply: {finish}")
            return Event.BROKEN, Reply(error=error)
        if finish == "length":
            return Event.CUT, Reply(error=ErrorInfo("reply_too_long", "the reply reached its length limit"))
        reply = parse_reply(text, self.profile.offered if self.limits.is_adaptive else {})
        if reply.call is not None:
            denial = self._denial(reply.call.view)
            if denial is None:
                return Event.GRANT, reply
            return Event.DENY, replace(reply, error=denial)
        if reply.error is None:
            return Event.ANSWER, reply
        can_retry = reply.is_bad_call and self.limits.is_adaptive and self.profile.on_bad_call == "retry"
        return (Event.RETRY if can_retry else Event.MALFORMED), reply

    def _denial(self, view: View) -> ErrorInfo | None:
        if view in self.views:
            return ErrorInfo("already_shown", self.profile["reasons.already_shown"])
        try:
            cost = self._cost(view) if self.geometry is not None else 0
        except ValueError as error:
            return ErrorInfo("box_outside", str(error))
        budget = self.limits.visual_token_budget
        if budget is not None and self.visual_tokens + cost > budget:
            message = f"the view has {cost} visual tokens, {budget - self.visual_tokens} are left"
            return ErrorInfo("budget", message)
        return None

    def _continue(self, then: Then, reply: Reply) -> Conversation:
        call = reply.call
        if then is Then.VIEW:
            assert call is not None
            shown = replace(self, views=(*self.views, call.view))
            return replace(shown, pending=shown._turn(shown._fill(f"response.{call.action}", call.view)))
        assert reply.error is not None
        if then is Then.DENIAL:
            reason = Text(self.profile[f"reasons.{reply.error.code}"])
            return replace(self, pending=self._turn(self._fill("response.denied", reason=reason)))
        # The message may hold a name out of the model's own text.
        reason = Text(reply.error.message, trusted=False)
        return replace(self, pending=self._turn(self._fill("response.bad_call", reason=reason)))

    def _opening(self, view: View) -> tuple[Part, ...]:
        mode, profile = ("adaptive" if self.limits.is_adaptive else "direct"), self.profile
        joiner = Text(profile["turn.joiner"])
        system = fill(profile[f"{mode}.system"], {"tools": profile.tool_lines})
        head = (Text(profile.open("system") + system + profile.close), joiner) if system else ()
        user = (Text(profile.open("user")), *self._fill(f"{mode}.user", view), Text(profile.close))
        return merged((*head, *user, joiner, *self._history(), Text(profile.open("assistant"))))

    def _history(self) -> tuple[Part, ...]:
        """Earlier answers in the taught form, each with the question that came after it."""
        profile, joiner = self.profile, Text(self.profile["turn.joiner"])
        later = [exchange.question for exchange in self.history[1:]] + [self.question]
        parts: list[Part] = []
        for exchange, question in zip(self.history, later, strict=False):
            parts.append(Text(profile.open("assistant")))
            for text, placeholder in pieces(profile["reply.answer"]):
                parts += [Text(text), Text(exchange.answer if placeholder == "answer" else "", trusted=False)]
            after = profile.close + profile["turn.joiner_after_reply"] + profile.open("user")
            parts += [Text(after), Text(question, trusted=False), Text(profile.close), joiner]
        return tuple(parts)

    def _turn(self, content: tuple[Part, ...]) -> tuple[Part, ...]:
        """A user turn after a reply (which ended with its own closing mark), and the opening of the next reply."""
        profile = self.profile
        before = Text(profile["turn.joiner_after_reply"] + profile.open("user"))
        return merged((before, *content, Text(profile.close + profile["turn.joiner"] + profile.open("assistant"))))

    def _fill(self, key: str, view: View | None = None, reason: Text | None = None) -> tuple[Part, ...]:
        """A template's parts. Untrusted: the question, and the reason when it may quote the model."""
        values = self._values(view)
        parts: list[Part] = []
        for text, placeholder in pieces(self.profile[key]):
            parts.append(Text(text))
            if placeholder == "question":
                first = self.history[0].question if self.history else self.question
                parts.append(Text(first, trusted=False))
            elif placeholder == "image":
                assert view is not None
                before, after = self.profile["turn.image"].split("{pixels}")
                parts += [Text(before), ImagePart(view), Text(after)]
            elif placeholder == "reason":
                assert reason is not None
                parts.append(reason)
            elif placeholder:
                parts.append(Text(self._value(values, key, placeholder)))
        return tuple(parts)

    def _value(self, values: Mapping[str, str], key: str, placeholder: str) -> str:
        if placeholder not in values:
            raise ValueError(f"profile {self.profile.name}: {key} states {{{placeholder}}}: give the image's geometry")
        return values[placeholder]

    def _values(self, view: View | None) -> dict[str, str]:
        profile, budget = self.profile, self.limits.visual_token_budget
        is_last = self.turn + 1 >= self.limits.num_turns
        values = {"or_call": "" if is_last else profile["reply.or_call"], "budget_note": "", "budget_left": ""}
        if view is not None and self.geometry is not None:
            size = self.geometry.size(view)
            values |= {"width": str(size.width), "height": str(size.height)}
        if budget is not None:
            used = self.visual_tokens
            values["budget_note"] = fill(profile["budget.note"], {"budget": str(budget), "used": str(used)})
            values["budget_left"] = fill(profile["budget.left"], {"left": str(budget - used)})
        return values

    def _cost(self, view: View) -> int:
        if self.geometry is None:
            raise ValueError("limits.visual_token_budget: needs the image's geometry")
        return self.geometry.size(view).visual_tokens
