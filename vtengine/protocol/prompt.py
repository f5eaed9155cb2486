"""What a conversation's turns look like in a profile's words. Pure: state in, parts of a prompt out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vtengine.protocol.messages import Exchange, Geometry, ImagePart, Part, Text, View, merged
from vtengine.protocol.profile import Profile, fill, pieces


@dataclass(frozen=True)
class Prompt:
    """The words of one conversation.

    questions: all of them, oldest first; history: those that were answered before. places: for each image, the number
    of the question that it stands with. One image with the first question has the plain prompt, no image that of the
    profile's section `text`; anything else has that of its section `several`, in which images are numbered.
    """

    profile: Profile
    geometry: Geometry | None
    question: str
    history: tuple[Exchange, ...]
    places: tuple[int, ...]
    adaptive: bool

    @property
    def is_several(self) -> bool:
        return self.places not in ((), (0,))

    @property
    def offered(self) -> dict[str, tuple[str, ...]]:
        """The tools of the prompt, as parse_reply wants them."""
        if not self.adaptive:
            return {}
        return self.profile.offered_of_several if self.is_several else self.profile.offered

    def opening(self, views: Sequence[View], values: Mapping[str, str]) -> tuple[Part, ...]:
        """Up to the mark that opens the model's first reply. views: one for each image; values: see `turn`."""
        mode, profile = ("text" if not self.places else "adaptive" if self.adaptive else "direct"), self.profile
        joiner = Text(profile["turn.joiner"])
        system = fill(profile[f"{mode}.system"], {"tools": profile.tool_lines(self.is_several)})
        head = (Text(profile.open("system") + system + profile.close), joiner) if system else ()
        first = self.history[0].question if self.history else self.question
        key = f"{mode}.user" if not self.is_several else "several.user" if self.adaptive else "several.direct"
        user = self._fill(key, self._placed(views, 0), values, Text(first, trusted=False))
        opened = (Text(profile.open("user")), *user, Text(profile.close), joiner)
        return merged((*head, *opened, *self._later(views), Text(profile.open("assistant"))))

    def turn(
        self, key: str, values: Mapping[str, str], views: Sequence[View] = (), reason: Text | None = None
    ) -> tuple[Part, ...]:
        """A user turn after a reply (which ended with its own closing mark), and the opening of the next reply.

        key: response.resize, response.crop, response.denied, response.bad_call; values: or_call, budget_left.
        """
        profile = self.profile
        if key == "response.resize" and self.is_several:
            key = "several.resize"
        before = Text(profile["turn.joiner_after_reply"] + profile.open("user"))
        content = self._fill(key, views, values, reason=reason)
        return merged((before, *content, Text(profile.close + profile["turn.joiner"] + profile.open("assistant"))))

    def _later(self, views: Sequence[View]) -> Iterable[Part]:
        """Earlier answers in the taught form, each with the question that came after it."""
        profile, joiner = self.profile, Text(self.profile["turn.joiner"])
        later = [exchange.question for exchange in self.history[1:]] + [self.question]
        for place, (exchange, asked) in enumerate(zip(self.history, later, strict=False), start=1):
            yield Text(profile.open("assistant"))
            for text, placeholder in pieces(profile["reply.answer"]):
                yield Text(text)
                yield Text(exchange.answer if placeholder == "answer" else "", trusted=False)
            yield Text(profile.close + profile["turn.joiner_after_reply"] + profile.open("user"))
            question, placed = Text(asked, trusted=False), self._placed(views, place)
            yield from self._fill("several.later", placed, {}, question) if placed else (question,)
            yield Text(profile.close)
            yield joiner

    def _placed(self, views: Sequence[View], question: int) -> list[View]:
        return [view for view in views if self.places[view.image] == question]

    def _fill(
        self,
        key: str,
        views: Sequence[View],
        values: Mapping[str, str],
        question: Text | None = None,
        reason: Text | None = None,
    ) -> tuple[Part, ...]:
        """A template's parts. Untrusted: the question, and the reason when it may quote the model."""
        texts = {"question": question, "reason": reason}
        if len(views) == 1:
            values = {**values, **self._sizes(views[0])}
        parts: list[Part] = []
        for text, placeholder in pieces(self.profile[key]):
            parts.append(Text(text))
            if placeholder == "image":
                (view,) = views
                parts += self._image(view)
            elif placeholder == "images":
                for view in views:
                    parts += self._fill("several.image", (view,), {"number": str(view.image + 1)})
            elif (given := texts.get(placeholder)) is not None:
                parts.append(given)
            elif placeholder:
                parts.append(Text(self._value(values, key, placeholder)))
        return tuple(parts)

    def _image(self, view: View) -> tuple[Part, ...]:
        before, after = self.profile["turn.image"].split("{pixels}")
        return Text(before), ImagePart(view), Text(after)

    def _sizes(self, view: View) -> dict[str, str]:
        if self.geometry is None:
            return {}
        size = self.geometry.size(view)
        return {"width": str(size.width), "height": str(size.height)}

    def _value(self, values: Mapping[str, str], key: str, placeholder: str) -> str:
        if placeholder not in values:
            raise ValueError(f"profile {self.profile.name}: {key} states {{{placeholder}}}: give the image's geometry")
        return values[placeholder]
