"""`vtengine ask`: one question, about an image or none; each turn is printed as it is written, then the account."""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.cli.arguments import NO_IMAGE
from vtengine.cli.errors import OK, ROWS_REJECTED, CliError, UsageError
from vtengine.cli.session import open_session
from vtengine.vision.source import is_url

if TYPE_CHECKING:
    from vtengine.rollout.episode import Episode, Event

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(arguments: argparse.Namespace) -> int:
    """Prints the episode; status 3 when the question was rejected or failed."""
    if not arguments.question.strip():
        raise UsageError("QUESTION is empty")
    episode = asyncio.run(_ask(arguments))
    if episode.error is not None and episode.status in ("rejected", "failed"):
        raise CliError(f"{episode.status}: {episode.error.message} ({episode.error.code})", status=ROWS_REJECTED)
    _print_account(episode)
    return OK


async def _ask(arguments: argparse.Namespace) -> Episode:
    from dataclasses import replace

    from vtengine.rollout.episode import run_episode
    from vtengine.rollout.question import Question

    source, root = _image(arguments.image)
    question = Question("ask", source, arguments.question, root)
    async with open_session(arguments, concurrency=1) as setting:
        sampling = replace(setting.sampling, seed=arguments.seed)
        parts = (setting.backend, setting.pipeline, setting.tokenizer, setting.profile, setting.limits, sampling)
        return await run_episode(question, *parts, on_event=_print_event)


def _image(image: str) -> tuple[str | None, Path]:
    """(source, root): the user named this file, so its folder is the root."""
    if image == NO_IMAGE:
        return None, Path()
    if is_url(image):
        return image, Path()
    path = Path(image).resolve()
    return path.name, path.parent


def _print_event(event: Event) -> None:
    from vtengine.rollout.episode import Asked, TextDelta

    if isinstance(event, Asked):
        shown = ", ".join(f"{image.width}x{image.height} ({image.visual_tokens} tokens)" for image in event.images)
        _write(
            f"turn {event.turn + 1}: {'image ' + shown + ', ' if shown else ''}{event.prompt_tokens} prompt tokens\n"
        )
    elif isinstance(event, TextDelta):
        _write(plain(event.text))
    else:
        done = event.record.completion
        account = f"{done.cached_tokens} from the cache, {done.prefill_tokens} prefilled, {len(done.token_ids)} written"
        _write(f"\n  [{account}; first token {done.ttft_s:.2f} s, all {done.latency_s:.2f} s]\n")


def _print_account(episode: Episode) -> None:
    answer = plain(episode.answer) if episode.answer is not None else f"none ({episode.status})"
    if episode.answer is None and episode.error is not None:
        answer = f"none ({episode.status}: {plain(episode.error.message)})"
    _write(f"answer: {answer}\n")
    completions = [turn.completion for turn in episode.turns]
    prompt = sum(done.prompt_tokens for done in completions)
    cached = sum(done.cached_tokens for done in completions)
    written = sum(len(done.token_ids) for done in completions)
    if full := episode.visual_tokens_full:
        _write(f"visual tokens: {episode.visual_tokens} of {full} always-high ({episode.visual_tokens / full:.0%})\n")
    _write(f"prompt tokens: {prompt}, {cached} of them from the cache; written: {written}; {episode.latency_s:.2f} s\n")


def plain(text: str) -> str:
    """Model text without control characters, which a terminal would obey."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone; the episode may end in peace
        sys.stdout = io.StringIO()
