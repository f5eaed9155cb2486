"""What must hold of a transcript after anything that can be done to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtengine.engine.base import Completion, ImageInput, SamplingParams
from vtengine.model.positions import mrope_positions
from vtengine.protocol.messages import HIGH, LOW, Ask, ImagePart, Text
from vtengine.rollout.seeds import derive_seed
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.rollout.transcript import BadCompletion, ContextFull, Transcript

QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
OPEN, IMAGE, CLOSE = Text("<|im_start|>user\n<|vision_start|>"), ImagePart(LOW), Text("<|vision_end|>")


def image(tokens: int = 4) -> ImageInput:
    return ImageInput(f"image of {tokens}", (1, 2, 2 * tokens), pixel_values=None)  # type: ignore[arg-type]


def ask(question: str = "why?", num_images: int = 1, turn: int = 0) -> Ask:
    images = [part for _ in range(num_images) for part in (IMAGE, CLOSE)]
    return Ask((OPEN, *images, Text(question, trusted=False), Text("<|im_end|>\n<|im_start|>assistant\n")), turn)


def completion(ids: Sequence[int], num_images: int = 1, version: int = 0) -> Completion:
    logprobs = tuple(-0.5 - i for i in range(len(ids)))
    encoded = (False,) * num_images
    return Completion("r", tuple(ids), logprobs, "stop", 10, 4, encoded, version, 0.1, 0.2)


def snapshot(transcript: Transcript) -> tuple[list[int], list[float], list[bool]]:
    return list(transcript.token_ids), list(transcript.logprobs), list(transcript.trainable)


STEPS = st.lists(
    st.tuples(
        st.text(max_size=12),
        st.lists(st.integers(1, 6), max_size=3),  # visual tokens of each image
        st.lists(st.integers(0, 10_000), max_size=8),  # sampled ids, taken modulo the vocabulary
        st.booleans(),  # ends with the closing id
    ),
    max_size=5,
)


@QUICK
@given(STEPS, st.integers(20, 200))
def test_it_only_grows(tokenizer: Tokenizer, steps: list, max_tokens: int) -> None:
    transcript = Transcript(tokenizer, max_tokens)
    sampled: list[int] = []
    vocab_size = tokenizer.vocab_size  # counted anew each time
    for turn, (question, sizes, raw, ends) in enumerate(steps):
        before = snapshot(transcript)
        try:
            transcript.append_ask(ask(question, len(sizes), turn), [image(size) for size in sizes])
        except ContextFull:
            assert snapshot(transcript) == before
            break
        room = transcript.request("r", turn, SamplingParams(max_new_tokens=1000)).sampling.max_new_tokens
        assert room >= 1 and len(transcript) + room == max_tokens
        ids = [i for i in (x % vocab_size for x in raw) if i not in tokenizer.banned_ids]
        ids = (ids + [tokenizer.turn_end_id] * ends)[:room]
        transcript.commit(completion(ids, len(transcript.images), turn))
        sampled += ids
        transcript.check_integrity()
        for old, new in zip(before, snapshot(transcript), strict=True):
            assert new[: len(old)] == old
    own = [i for i, is_own in zip(transcript.token_ids, transcript.trainable, strict=True) if is_own]
    assert own == sampled
    assert transcript.visual_tokens == sum(span.image.visual_tokens for span in transcript.images)


@QUICK
@given(STEPS)
def test_positions_grow_with_it(small_tokenizer: Tokenizer, steps: list) -> None:
    transcript = Transcript(small_tokenizer)
    for turn, (question, sizes, raw, _) in enumerate(steps):
        transcript.append_ask(ask(question, len(sizes), turn), [image(size) for size in sizes])
        if turn % 2:
            transcript.positions()
        transcript.commit(completion([x % 250 for x in raw], len(transcript.images)))
        grids = [span.image.grid_thw for span in transcript.images]
        whole, _ = mrope_positions(transcript.token_ids, grids, image_token_id=small_tokenizer.image_pad_id)
        if turn % 3:
            assert torch.equal(transcript.positions(), whole)
    assert transcript.positions().shape == (3, len(transcript))


def test_sampled_ids_stay_as_they_are(tokenizer: Tokenizer) -> None:
    """Ids that no tokenizer would give for their text: byte by byte."""
    ids = [i for letter in "the" for i in tokenizer.encode_untrusted(letter)] + [tokenizer.turn_end_id]
    assert len(ids) == 4 and tokenizer.encode_untrusted("the") != ids[:-1]
    transcript = Transcript(tokenizer)
    transcript.append_ask(ask(), [image()])
    start = len(transcript)
    assert transcript.commit(completion(ids)) == "the"
    transcript.append_ask(replace(ask(turn=1), parts=(Text("\n<|im_start|>user\nno"),)), [])
    assert transcript.token_ids[start : start + 4] == ids
    assert transcript.trainable[start : start + 5] == [True] * 4 + [False]
    assert transcript.logprobs[start : start + 5] == [-0.5, -1.5, -2.5, -3.5, 0.0]
    assert transcript.logprob_sum == -8.0
    assert transcript.sampled[0].end == start + 4


def test_a_reply_without_its_closing_mark_is_closed_by_us(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    transcript.append_ask(ask(), [image()])
    start = len(transcript)
    end_of_text = tokenizer.special_id("<|endoftext|>")
    assert end_of_text is not None
    assert transcript.commit(completion([*tokenizer.encode_untrusted("hi"), end_of_text])) == "hi"
    at = len(transcript)
    transcript.append_ask(Ask((Text("\n<|im_start|>user\n"),), 1), [])
    assert transcript.token_ids[at] == tokenizer.turn_end_id and not transcript.trainable[at]
    assert all(transcript.trainable[start:at])


def test_the_limit_never_cuts_an_image(tokenizer: Tokenizer) -> None:
    probe = Transcript(tokenizer)
    probe.append_ask(ask(), [image(50)])
    size = len(probe)
    for max_tokens in range(size - 60, size + 1):
        transcript = Transcript(tokenizer, max_tokens)
        with pytest.raises(ContextFull, match=f"turn 1 needs {size + 1} tokens of context, {max_tokens} are allowed"):
            transcript.append_ask(ask(), [image(50)])
        assert len(transcript) == 0 and not transcript.images
    Transcript(tokenizer, size + 1).append_ask(ask(), [image(50)])


def test_requests_ban_markers_and_end_at_the_marks(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    transcript.append_ask(ask(), [image(3)])
    sampling = SamplingParams(seed=7, logit_bias={5: 1.0, tokenizer.image_pad_id: 9.0}, stop_token_ids=(9,))
    request = transcript.request("q/0", 0, sampling)
    assert request.token_ids == tuple(transcript.token_ids) and request.images == (image(3),)
    assert request.token_ids.count(tokenizer.image_pad_id) == 3
    assert request.sampling.stop_token_ids == (*tokenizer.stop_ids, 9)
    assert {i for i, bias in request.sampling.logit_bias.items() if bias == -math.inf} == tokenizer.banned_ids
    assert request.sampling.logit_bias[5] == 1.0
    assert request.sampling.seed == derive_seed(7, 0) != transcript.request("q/1", 1, sampling).sampling.seed
    assert transcript.request("q/0", 0, SamplingParams()).sampling.seed is None


def test_bad_completions_are_refused(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    transcript.append_ask(ask(), [image()])
    before = snapshot(transcript)
    good = completion([3, 4])
    for bad, message in (
        (replace(good, logprobs=(0.0,)), "1 logprobs for 2 sampled ids"),
        (replace(good, token_ids=(3, tokenizer.image_pad_id)), "which is banned"),
        (replace(good, images_encoded=()), "0 image accounts for 1 images"),
    ):
        with pytest.raises(BadCompletion, match=message):
            transcript.commit(bad)
    assert snapshot(transcript) == before


def test_views_and_images_must_agree(tokenizer: Tokenizer) -> None:
    with pytest.raises(AssertionError, match="0 images for 1 views"):
        Transcript(tokenizer).append_ask(Ask((ImagePart(HIGH),), 0), [])


def test_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, "a", 0) == 710339698842597104
    seeds = {derive_seed(s, i, n) for s in range(5) for i in (1, "1", "a") for n in range(20)}
    assert len(seeds) == 5 * 3 * 20 and all(0 <= seed < 2**63 for seed in seeds)
