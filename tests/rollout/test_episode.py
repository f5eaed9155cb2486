"""The loop over a scripted backend: every status, every fault, accounts, events."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import pytest

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request, RequestRejected, SamplingParams
from vtengine.engine.scripted import ScriptedBackend
from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import Status
from vtengine.protocol.profile import Profile, load_profile
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.episode import Asked, Episode, Event, Replied, TextDelta, run_episode
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.errors import ImageError

GLANCE, VTENGINE = load_profile("glance"), load_profile("vtengine")
CALL = GLANCE.reply_call("small", RESIZE_CALL)
CROP = '<think>a</think><tool_call>{"name": "crop_image", "arguments": {"box": [0, 0, 56, 56]}}</tool_call>'
ANSWER = GLANCE.reply_answer("clear", "né 5")
QUESTION = Question("q1", "560x560", "What?")


def play(
    tokenizer: Tokenizer,
    pipeline: Any,
    replies: Any,
    *,
    profile: Profile = GLANCE,
    limits: Limits | None = None,
    question: Question = QUESTION,
    events: list[Event] | None = None,
    **sampling: Any,
) -> tuple[Episode, Any]:
    backend = replies if hasattr(replies, "generate") else ScriptedBackend(tokenizer, replies)
    on_event = None if events is None else events.append
    params = SamplingParams(**sampling)
    episode = asyncio.run(
        run_episode(question, backend, pipeline, tokenizer, profile, limits or Limits(), params, on_event)
    )
    episode.transcript.check_integrity()
    assert episode.status in get_args(Status)
    assert (episode.error is None) == (episode.status == "answered") == (episode.answer is not None)
    return episode, backend


def test_answered_at_once(tokenizer: Tokenizer, pipeline: Any) -> None:
    episode, backend = play(tokenizer, pipeline, [ANSWER])
    assert (episode.status, episode.answer, episode.is_upscaled) == ("answered", "né 5", False)
    assert (episode.visual_tokens, episode.visual_tokens_full) == (100, 400)
    (turn,) = episode.turns
    assert turn.text == ANSWER and turn.action is None and turn.completion.finish == "stop"
    assert [(i.width, i.height, i.visual_tokens, i.encoded) for i in turn.images] == [(280, 280, 100, True)]
    assert len(backend.requests) == 1 and pipeline.num_views == 1


def test_upscaled_then_answered(tokenizer: Tokenizer, pipeline: Any) -> None:
    episode, backend = play(tokenizer, pipeline, [CALL, ANSWER])
    assert (episode.status, episode.is_upscaled, episode.visual_tokens) == ("answered", True, 500)
    first, second = episode.turns
    assert first.action == "resize" and second.action is None
    assert [image.visual_tokens for image in second.images] == [400] and second.reencoded_images == 0
    one, two = backend.requests
    assert two.token_ids[: len(one.token_ids)] == one.token_ids, "the context only grows"
    assert len(two.images) == 2
    assert one.began_s == two.began_s is not None, "engines tell a second turn from a new conversation by it"
    reused = len(one.token_ids) + len(first.completion.token_ids)
    assert second.completion.cached_tokens == reused, "nothing of turn 1 is prefilled again"
    assert episode.transcript.positions().shape[1] == len(episode.transcript)


def test_the_context_is_the_golden_text(tokenizer: Tokenizer, pipeline: Any) -> None:
    profile = load_profile("visionthink")
    call = profile.reply_call("small", RESIZE_CALL)
    episode, _ = play(tokenizer, pipeline, [call, ANSWER], profile=profile)
    text = tokenizer.decode(episode.transcript.token_ids)
    assert f"{call}<|im_end|><|im_start|>user\n<tool_response>\nThe resized image is shown below:\n" in text
    assert text.endswith(f"<|im_start|>assistant\n{ANSWER}<|im_end|>")
    assert text.count("<|image_pad|>") == 500


@pytest.mark.parametrize(("resolution", "tokens"), [("low", 100), ("high", 400)])
def test_direct_resolutions(tokenizer: Tokenizer, pipeline: Any, resolution: Any, tokens: int) -> None:
    episode, _ = play(tokenizer, pipeline, [ANSWER], limits=Limits(resolution))
    assert (episode.status, episode.visual_tokens) == ("answered", tokens)


@pytest.mark.parametrize(
    ("replies", "limits", "status", "code", "num_turns"),
    [
        (["5"], Limits(), "malformed", "answer_missing", 1),
        ([CALL], Limits("low"), "malformed", "tool_not_offered", 1),
        ([CALL + CALL], Limits(), "malformed", "calls_many", 1),
        ([CALL, CALL], Limits(), "turn_limit", "already_shown", 2),
        ([CALL], Limits(max_turns=1), "turn_limit", "turn_limit", 1),
        ([CALL, "x" * 300], Limits(), "truncated", "reply_too_long", 2),
        ([], Limits(visual_token_budget=99), "rejected", "visual_budget_too_small", 0),
        ([], Limits(max_context_tokens=100), "rejected", "prompt_too_long", 0),
        ([CALL], Limits(max_context_tokens=600), "truncated", "context_full", 1),
        ([RequestRejected("too_long", "no")], Limits(), "rejected", "too_long", 0),
        ([BackendFailed("a"), BackendFailed("b")], Limits(), "failed", "backend_failed", 0),
        ([CALL, BackendFailed("a"), BackendFailed("b")], Limits(), "failed", "backend_failed", 1),
        ([KeyError("surprise")], Limits(), "failed", "internal_error", 0),
    ],
)
def test_every_ending(
    small_tokenizer: Tokenizer,
    pipeline: Any,
    replies: list[Any],
    limits: Limits,
    status: str,
    code: str,
    num_turns: int,
) -> None:
    episode, _ = play(small_tokenizer, pipeline, replies, limits=limits, max_new_tokens=299)
    assert episode.error is not None
    assert (episode.status, episode.error.code, len(episode.turns)) == (status, code, num_turns)


@pytest.mark.parametrize(
    ("replies", "fault"),
    [
        ([RequestRejected("no_key", "give one", "setup")], "no_key: give one"),
        ([CALL, RequestRejected("no_key", "give one", "setup")], "no_key: give one"),
        ([RequestRejected("too_long", "no")], None),
        ([RequestRejected("refused", "no", "unclear")], None),
        ([BackendFailed("a"), BackendFailed("b")], None),
        ([ANSWER], None),
    ],
)
def test_an_episode_tells_when_the_setup_is_to_blame(
    small_tokenizer: Tokenizer, pipeline: Any, replies: list[Any], fault: str | None
) -> None:
    episode, _ = play(small_tokenizer, pipeline, replies)
    assert episode.setup_fault == fault
    assert episode.error is None or set(episode.error.row()) == {"code", "message"}


def test_a_broken_backend_is_asked_again(tokenizer: Tokenizer, pipeline: Any) -> None:
    episode, backend = play(tokenizer, pipeline, [BackendFailed("lost"), ANSWER], seed=3)
    assert episode.status == "answered"
    assert backend.requests[0] == backend.requests[1], "the same request, the same seed"


@pytest.mark.parametrize(
    ("question", "code"),
    [(Question("q", "gone.png", "What?"), "image_not_found"), (Question("q", "28x28", "\ud800?"), "text_not_unicode")],
)
def test_bad_questions(tokenizer: Tokenizer, pipeline: Any, question: Question, code: str) -> None:
    episode, backend = play(tokenizer, pipeline, [ANSWER], question=question)
    assert episode.status == "rejected" and episode.error is not None and episode.error.code == code
    assert episode.visual_tokens_full == 0 and not backend.requests


def test_a_view_that_cannot_be_made(tokenizer: Tokenizer, pipeline: Any) -> None:
    def fail(plan: Any) -> None:
        if plan.height > 280:
            raise ImageError("image_corrupt", "the file has changed")

    pipeline.on_view = fail
    episode, _ = play(tokenizer, pipeline, [CALL])
    assert episode.error is not None
    assert (episode.status, episode.error.code, episode.is_upscaled) == ("rejected", "image_corrupt", False)
    assert episode.visual_tokens == 100


def test_an_image_out_of_reach_fails_and_is_not_rejected(tokenizer: Tokenizer, pipeline: Any) -> None:
    """What fails is tried again by a resumed run."""

    async def fail(source: str, root: Any) -> None:
        raise ImageError("image_unreachable", "the server answered with status 503")

    pipeline.open = fail
    episode, backend = play(tokenizer, pipeline, [ANSWER])
    assert episode.error is not None and not backend.requests
    assert (episode.status, episode.error.code) == ("failed", "image_unreachable")


def test_denied_and_corrected(tokenizer: Tokenizer, pipeline: Any) -> None:
    bad = "<think>a</think><tool_call>{}</tool_call>"
    limits = Limits(max_turns=4, visual_token_budget=150)
    episode, _ = play(tokenizer, pipeline, [CALL, bad, CROP, ANSWER], profile=VTENGINE, limits=limits)
    assert episode.status == "answered" and [turn.action for turn in episode.turns] == ["resize", None, "crop", None]
    assert [len(turn.images) for turn in episode.turns] == [1, 0, 0, 1]
    assert episode.visual_tokens == 100 + 16
    text = tokenizer.decode(episode.transcript.token_ids)
    assert "more visual tokens than the budget leaves" in text and "could not be read: name is missing" in text


def test_seeds_differ_by_turn(tokenizer: Tokenizer, pipeline: Any) -> None:
    _, backend = play(tokenizer, pipeline, [CALL, ANSWER], seed=11)
    first, second = (request.sampling.seed for request in backend.requests)
    assert first != second and None not in (first, second)


def test_events_in_order(tokenizer: Tokenizer, pipeline: Any) -> None:
    events: list[Event] = []
    episode, _ = play(tokenizer, pipeline, [CALL, ANSWER], events=events)
    quiet, _ = play(tokenizer, pipeline, [CALL, ANSWER])
    assert [turn.text for turn in episode.turns] == [turn.text for turn in quiet.turns]
    for number, turn in enumerate(episode.turns):
        own = [event for event in events if event.turn == number]
        assert isinstance(own[0], Asked) and own[0].prompt_tokens == turn.completion.prompt_tokens
        assert "".join(event.text for event in own if isinstance(event, TextDelta)) == turn.text
        assert own[-1] == Replied(number, turn)
    assert [event.turn for event in events] == sorted(event.turn for event in events)


class Breaking(ScriptedBackend):
    """Breaks in the middle of a stream."""

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        assert on_tokens is not None
        on_tokens((5,))
        raise BackendFailed("lost in the middle")


class Endless(ScriptedBackend):
    """Never answers; notes that it was stopped."""

    stopped = False

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        if on_tokens is not None:
            on_tokens((5,))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.stopped = True
            raise
        raise AssertionError


def test_a_stream_that_broke_is_not_sent_twice(tokenizer: Tokenizer, pipeline: Any) -> None:
    episode, backend = play(tokenizer, pipeline, Breaking(tokenizer, []), events=[])
    assert episode.status == "failed" and len(backend.requests) == 1


@pytest.mark.parametrize("streams", [True, False])
def test_cancelling_reaches_the_backend(small_tokenizer: Tokenizer, pipeline: Any, streams: bool) -> None:
    backend = Endless(small_tokenizer, [])
    on_event = (lambda event: None) if streams else None

    async def main() -> None:
        async with asyncio.timeout(0.05):
            await run_episode(
                QUESTION, backend, pipeline, small_tokenizer, GLANCE, Limits(), SamplingParams(), on_event
            )

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert backend.stopped


def test_weight_versions_are_recorded(tokenizer: Tokenizer, pipeline: Any) -> None:
    backend = ScriptedBackend(tokenizer, [CALL, ANSWER])
    asyncio.run(backend.load_weights({}, 7))
    episode, _ = play(tokenizer, pipeline, backend)
    assert [span.weight_version for span in episode.transcript.sampled] == [7, 7]
    assert [turn.completion.weight_version for turn in episode.turns] == [7, 7]


def test_with_real_pixels(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from PIL import Image

    from vtengine.vision.pipeline import ImagePipeline

    Image.new("RGB", (500, 300), "red").save(tmp_path / "red.png")
    with ImagePipeline(num_workers=1) as pipeline:
        question = Question("q", "red.png", "Colour?", tmp_path)
        episode, backend = play(small_tokenizer, pipeline, [CALL, ANSWER], question=question)
    assert episode.status == "answered" and episode.visual_tokens_full == 18 * 11
    low, high = backend.requests[1].images
    assert (low.width, low.height, high.width, high.height) == (252, 168, 504, 308)
    assert high.pixel_values.shape == (18 * 11 * 4, 1176)
