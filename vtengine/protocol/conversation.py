"""The conversation as a pure, immutable state machine: what is asked, what a reply leads to. No tokens, no pixels.

conversation = Conversation.start(question, profile, Limits())
while (ask := conversation.ask()) is not None:
    conversation = conversation.after(reply_text, finish)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import Literal

from vtengine.protocol.messages import (
    RESOLUTIONS,
    Ask,
    ErrorInfo,
    Exchange,
    Geometry,
    Part,
    Resolution,
    Status,
    Text,
    View,
)
from vtengine.protocol.profile import Profile, fill
from vtengine.protocol.prompt import Prompt
from vtengine.protocol.reply import Reply, parse_reply
from vtengine.protocol.tools import CROP, ToolCall, read_scale, whole_view

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Limits:
    """resolution: adaptive offers the tools; low and high are one direct turn. max_turns counts replies.

    visual_token_budget: the most visual tokens an episode may show, the first view included; None = no limit.
    max_context_tokens: the most tokens of prompt and replies together, for whoever counts tokens; None = no limit.
    scale: the most that is shown of a whole image, as a share of the high view's sides, above 0.5 and at most 1; it
    stands for the high view, and a call for more gets this. None = 1.
    """

    resolution: Resolution = "adaptive"
    max_turns: int = 2
    visual_token_budget: int | None = None
    max_context_tokens: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"limits.resolution = {self.resolution!r}: must be one of {', '.join(RESOLUTIONS)}")
        if self.max_turns < 1:
            raise ValueError(f"limits.max_turns = {self.max_turns}: must be >= 1")
        for name in ("visual_token_budget", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"limits.{name} = {value}: must be >= 1, or left out")
        if self.scale is not None and not 0.5 < self.scale <= 1:
            raise ValueError(f"limits.scale = {self.scale}: must be above 0.5 and at most 1, or left out")

    @property
    def is_adaptive(self) -> bool:
        return self.resolution == "adaptive"

    @property
    def num_turns(self) -> int:
        """Replies allowed: a direct prompt has one."""
        return self.max_turns if self.is_adaptive else 1

    def first_view(self, image: int) -> View:
        return self.capped(View("high" if self.resolution == "high" else "low", image=image))

    def capped(self, view: View) -> View:
        """The view that is shown where `view` is asked for."""
        most = Fraction(1) if self.scale is None else read_scale(self.scale)
        if view.kind not in ("high", "scale") or (view.scale or 1) <= most:
            return view
        return whole_view(most, view.image)


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

    places: for each image, the number of the question it stands with, the oldest being 0. Without images there is one
    turn, as for a direct prompt: there is nothing to ask for.
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
    places: tuple[int, ...] = (0,)

    @classmethod
    def start(
        cls,
        question: str,
        profile: Profile,
        limits: Limits | None = None,
        geometry: Geometry | None = None,
        history: tuple[Exchange, ...] = (),
        places: tuple[int, ...] = (0,),
    ) -> Conversation:
        """The first ask is ready, or the status is already `rejected`: the first views are over the budget, or the
        profile has no words for images as `places` has them.

        history: what was asked before. geometry: needed for a budget, for a crop's bounds, and by profiles that state
        view sizes; ValueError if it is missing then.
        """
        limits = limits or Limits()
        assert list(places) == sorted(places) and all(place <= len(history) for place in places), places
        views = tuple(limits.first_view(image) for image in range(len(places)))
        start = cls(question, profile, limits, geometry, views=views, history=history, places=places)
        if start.prompt.is_several and not profile.knows_several:
            message = f"the profile {profile.name} takes one image, with the first question; this has {len(places)}"
            return start._close("rejected", ErrorInfo("images_unsupported", message))
        budget = limits.visual_token_budget
        if budget is not None and start.visual_tokens > budget:
            alone = f"the {views[0].kind} view alone has" if len(views) == 1 else f"the first {len(views)} views have"
            message = f"{alone} {start.visual_tokens} visual tokens, the budget is {budget}"
            return start._close("rejected", ErrorInfo("visual_budget_too_small", message))
        return replace(start, pending=start.prompt.opening(views, start._values()))

    @property
    def prompt(self) -> Prompt:
        """The words of its turns."""
        return Prompt(self.profile, self.geometry, self.question, self.history, self.places, self.is_adaptive)

    @property
    def is_adaptive(self) -> bool:
        """The prompt offers the tools."""
        return self.limits.is_adaptive and bool(self.places)

    @property
    def num_turns(self) -> int:
        """Replies allowed."""
        return self.limits.num_turns if self.places else 1

    @property
    def visual_tokens(self) -> int:
        """Visual tokens shown so far. Raises ValueError without geometry."""
        return sum(self._cost(view) for view in self.views)

    @property
    def is_upscaled(self) -> bool:
        """A closer view was shown after the first ones."""
        return len(self.views) > len(self.places)

    def ask(self) -> Ask | None:
        """What to append and send, or None once the status is set. Pure: asking twice gives the same."""
        return None if self.pending is None else Ask(self.pending, self.turn)

    def after(self, text: str, finish: Finish = "stop") -> Conversation:
        """The state after the model's reply (its text without the closing mark). Every bad reply is a status."""
        assert self.status is None, f"the conversation has ended: {self.status}"
        event, reply = self._classify(text, finish)
        situation = Situation.OPEN if self.turn + 1 < self.num_turns else Situation.LAST
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
        reply = self._checked(parse_reply(text, self.prompt.offered))
        if reply.call is not None:
            denial = self._denial(reply.call)
            if denial is None:
                return Event.GRANT, reply
            return Event.DENY, replace(reply, error=denial)
        if reply.error is None:
            return Event.ANSWER, reply
        can_retry = reply.is_bad_call and self.is_adaptive and self.profile.on_bad_call == "retry"
        return (Event.RETRY if can_retry else Event.MALFORMED), reply

    def _checked(self, reply: Reply) -> Reply:
        """A call about an image that is not there, or that leaves open in which image a box lies, is a bad call."""
        call, count = reply.call, len(self.places)
        if call is None:
            return reply
        if call.image is not None and call.image > count:
            error = ErrorInfo("argument_value", f"image is 1 to {count}")
        elif call.image is None and call.name == CROP and count > 1:
            error = ErrorInfo("argument_missing", "image is missing")
        else:
            return reply
        return replace(reply, call=None, error=error, is_bad_call=True)

    def _new_views(self, call: ToolCall) -> tuple[View, ...]:
        """What the call asks for and was not shown yet; a call that names no image is about all of them."""
        images = range(len(self.places)) if call.image is None and call.name != CROP else (call.view.image,)
        asked = (self.limits.capped(replace(call.view, image=image)) for image in images)
        return tuple(view for view in asked if view not in self.views)

    def _denial(self, call: ToolCall) -> ErrorInfo | None:
        views = self._new_views(call)
        if not views:
            return ErrorInfo("already_shown", self.profile["reasons.already_shown"])
        try:
            cost = sum(map(self._cost, views)) if self.geometry is not None else 0
        except ValueError as error:
            return ErrorInfo("box_outside", str(error))
        budget = self.limits.visual_token_budget
        if budget is not None and self.visual_tokens + cost > budget:
            message = f"the view has {cost} visual tokens, {budget - self.visual_tokens} are left"
            return ErrorInfo("budget", message)
        return None

    def _continue(self, then: Then, reply: Reply) -> Conversation:
        """`self` has counted the reply already."""
        if then is Then.VIEW:
            assert reply.call is not None
            views = self._new_views(reply.call)
            shown = replace(self, views=self.views + views)
            return replace(shown, pending=self.prompt.turn(f"response.{reply.call.action}", shown._values(), views))
        assert reply.error is not None
        if then is Then.DENIAL:
            key, reason = "response.denied", Text(self.profile[f"reasons.{reply.error.code}"])
        else:  # the message may hold a name out of the model's own text
            key, reason = "response.bad_call", Text(reply.error.message, trusted=False)
        return replace(self, pending=self.prompt.turn(key, self._values(), reason=reason))

    def _values(self) -> dict[str, str]:
        """What templates may state beside questions and images."""
        profile, budget = self.profile, self.limits.visual_token_budget
        is_last = self.turn + 1 >= self.num_turns
        values = {"or_call": "" if is_last else profile["reply.or_call"], "budget_note": "", "budget_left": ""}
        if budget is not None:
            used = self.visual_tokens
            values["budget_note"] = fill(profile["budget.note"], {"budget": str(budget), "used": str(used)})
            values["budget_left"] = fill(profile["budget.left"], {"left": str(budget - used)})
        return values

    def _cost(self, view: View) -> int:
        if self.geometry is None:
            raise ValueError("limits.visual_token_budget: needs the image's geometry")
        return self.geometry.size(view).visual_tokens
