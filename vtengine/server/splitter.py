"""A reply, as it is written -> what is reasoning and what is the answer. Reads tags as `vtengine.protocol.reply`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vtengine.protocol.reply import ANSWER, THINK

Channel = Literal["reasoning_content", "content"]


class Piece(NamedTuple):
    channel: Channel
    text: str


class ReplySplitter:
    """Of one reply: the text of the first <answer> is content, without the white space around it; all else, the call
    with its tags included, is reasoning. Tags of thought and answer are dropped. However the text is cut into pieces,
    the joined result is the same; for a reply that answers, the content is its answer. places: where in the reply each
    character of the content stands.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._in_think = self._thought = False
        self._in_answer = self._answered = False
        self._blank = ""  # white space of the answer that may turn out to be its end
        self._blank_places: list[int] = []
        self._read = 0  # characters
        self.places: list[int] = []
        self._wrote = False

    def push(self, text: str) -> list[Piece]:
        """New pieces; what may be the beginning of a tag waits."""
        self._pending += text
        pieces: list[Piece] = []
        while (found := self._next_tag()) is not None:
            place, tag = found
            self._emit(pieces, self._pending[:place])
            self._pending = self._pending[place + len(tag) :]
            self._read += len(tag)
            self._turn(tag)
        held = self._held()
        self._emit(pieces, self._pending[: len(self._pending) - held])
        self._pending = self._pending[len(self._pending) - held :]
        return _joined(pieces)

    def flush(self) -> list[Piece]:
        """What is left at the end of the reply."""
        pieces: list[Piece] = []
        self._emit(pieces, self._pending)
        self._pending = ""
        return pieces

    def _wanted(self) -> tuple[str, ...]:
        """Tags that mean something at this place."""
        if self._in_think:
            return THINK[1:]
        tags = () if self._thought else THINK[:1]
        if self._in_answer:
            return (*tags, ANSWER[1])
        return tags if self._answered else (*tags, ANSWER[0])

    def _next_tag(self) -> tuple[int, str] | None:
        place = self._pending.find("<")
        while place >= 0:
            for tag in self._wanted():
                if self._pending.startswith(tag, place):
                    return place, tag
            place = self._pending.find("<", place + 1)
        return None

    def _held(self) -> int:
        """Characters at the end that could begin a tag; there is no `<` in a tag but its first character."""
        place = self._pending.rfind("<")
        end = self._pending[place:]
        return len(end) if place >= 0 and any(tag.startswith(end) for tag in self._wanted()) else 0

    def _turn(self, tag: str) -> None:
        if tag == THINK[0]:
            self._in_think = True
        elif tag == THINK[1]:
            self._in_think, self._thought = False, True
        elif tag == ANSWER[0]:
            self._in_answer = True
        else:
            self._in_answer, self._answered, self._blank, self._blank_places = False, True, "", []

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if not text:
            return
        start, self._read = self._read, self._read + len(text)
        if self._in_think or not self._in_answer:
            pieces.append(Piece("reasoning_content", text))
            return
        places = [*self._blank_places, *range(start, self._read)]
        text = self._blank + text
        if not self._wrote:
            text = text.lstrip()
        kept, places = text.rstrip(), places[len(places) - len(text) :]
        self._blank, self._blank_places = text[len(kept) :], places[len(kept) :]
        self.places += places[: len(kept)]
        if kept:
            self._wrote = True
            pieces.append(Piece("content", kept))


class StopCutter:
    """Cuts a text before a stop string, as it is written; of several, the one that is complete first."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._pending = ""
        self.done = False

    def push(self, text: str) -> str:
        """New text that is certain not to begin a stop string."""
        if self.done:
            return ""
        self._pending += text
        places = [(place + len(stop), place) for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if places:
            self.done = True
            return self._pending[: min(places)[1]]
        held = self._held()
        out, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return out

    def flush(self) -> str:
        out, self._pending = ("" if self.done else self._pending), ""
        return out

    def _held(self) -> int:
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0


def split_reply(text: str) -> tuple[str, str]:
    """(reasoning, content) of a whole reply."""
    splitter = ReplySplitter()
    pieces = [*splitter.push(text), *splitter.flush()]
    reasoning = "".join(piece.text for piece in pieces if piece.channel == "reasoning_content")
    return reasoning, "".join(piece.text for piece in pieces if piece.channel == "content")


def content_places(text: str) -> list[int]:
    """Where in a whole reply each character of its content stands."""
    splitter = ReplySplitter()
    splitter.push(text)
    splitter.flush()
    return splitter.places


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one channel in one piece."""
    result: list[Piece] = []
    for piece in pieces:
        if result and result[-1].channel == piece.channel:
            result[-1] = Piece(piece.channel, result[-1].text + piece.text)
        else:
            result.append(piece)
    return result
