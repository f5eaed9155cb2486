"""The format reward: FORMAT_REWARD if every condition of one table holds, else 0. docs/rewards.md shows this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtengine.rollout.episode import Episode, Turn

FORMAT_REWARD = 0.5


@dataclass(frozen=True)
class Condition:
    """`holds` looks at a whole episode; `text` says the same to people. broken_by: reply codes that break it."""

    name: str
    text: str
    holds: Callable[[Episode], bool]
    broken_by: tuple[str, ...] = ()


def _free_of(*flaws: str) -> Callable[[Episode], bool]:
    return lambda episode: not any(flaw in turn.reply.flaws for turn in episode.turns for flaw in flaws)


def _is_readable(turn: Turn) -> bool:
    """A well-formed call that was denied (budget, shown before, box outside) is still well-formed."""
    return turn.reply.answer is not None or (turn.reply.call is not None and not turn.reply.is_bad_call)


def _condition(name: str, text: str, *flaws: str) -> Condition:
    return Condition(name, text, _free_of(*flaws), flaws)


CONDITIONS: tuple[Condition, ...] = (
    Condition("answered", "The episode ended with an answer.", lambda episode: episode.status == "answered"),
    Condition(
        "ended_by_model",
        "Every reply ended by itself, not by its length limit.",
        lambda episode: all(turn.completion.finish == "stop" for turn in episode.turns),
    ),
    Condition(
        "calls_then_answer",
        "Every reply but the last is exactly one well-formed call; the last is exactly one answer. "
        "A well-formed call that is denied counts as well-formed.",
        lambda episode: (
            bool(episode.turns)
            and all(map(_is_readable, episode.turns))
            and all(turn.reply.call is not None for turn in episode.turns[:-1])
            and episode.turns[-1].reply.answer is not None
        ),
    ),
    _condition(
        "one_thought",
        "Every reply has exactly one `<think>...</think>` pair.",
        "think_missing",
        "think_repeated",
    ),
    _condition("thought_first", "Nothing but white space stands before the thought.", "text_before_think"),
    _condition("clean_thought", "No tag of the protocol stands inside the thought.", "tags_in_think"),
    _condition(
        "nothing_after",
        "Nothing but white space follows the answer or the call. Text between thought and answer or call is allowed.",
        "text_after_answer",
    ),
    Condition(
        "answer_not_empty",
        "The answer is not empty.",
        lambda episode: bool(episode.answer and episode.answer.strip()),
    ),
)


def broken_conditions(episode: Episode) -> tuple[str, ...]:
    """Names of the conditions that do not hold, in table order."""
    return tuple(condition.name for condition in CONDITIONS if not condition.holds(episode))


def format_reward(episode: Episode) -> float:
    """FORMAT_REWARD or 0."""
    return 0.0 if broken_conditions(episode) else FORMAT_REWARD


def conditions_table() -> str:
    """The table as Markdown."""
    rows = [
        f"| `{condition.name}` | {condition.text} | {' '.join(f'`{code}`' for code in condition.broken_by)} |"
        for condition in CONDITIONS
    ]
    return "\n".join(["| condition | holds when | flaw codes of the reply parser |", "|---|---|---|", *rows])
