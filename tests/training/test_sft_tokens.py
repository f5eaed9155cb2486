"""Tokenizer and teaching episodes: what is trained on is exactly what the rollout loop sends and expects."""

from __future__ import annotations

from pathlib import Path

import pytest
from vtengine_training.glance import make_scene
from vtengine_training.sft.episodes import Renderer, assemble
from vtengine_training.sft.tokenizer import ADDED, SPECIAL, THINK_FIRST, train_tokenizer, write_processor_files

from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.profile import load_profile
from vtengine.protocol.reply import parse_reply
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.tokenizer import Tokenizer as RolloutTokenizer

PROFILE = load_profile("glance")
TOKENIZER = train_tokenizer(PROFILE)
RENDERER = Renderer(TOKENIZER, PROFILE)
IMAGE = TOKENIZER.token_to_id("<|image_pad|>")


@pytest.mark.parametrize(
    "text",
    ["Price of TEA?", "K482", "4.25", "Grüße, 你好 \U0001f600", "  a\tb\r\n\r\nc ", "<think>I look.</think>", ""],
)
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_and_special_tokens_whole() -> None:
    assert len(TOKENIZER.encode("90210").ids) == 5
    for token in (*SPECIAL, *ADDED):
        assert TOKENIZER.encode(token).ids == [TOKENIZER.token_to_id(token)]
    assert train_tokenizer(PROFILE).to_str() == TOKENIZER.to_str()


def test_answer_and_call_part_at_one_token() -> None:
    answer = RENDERER.encode(PROFILE.reply_answer(THINK_FIRST, "42"))
    call = RENDERER.encode(PROFILE.reply_call(THINK_FIRST, RESIZE_CALL))
    common = next(i for i, (a, b) in enumerate(zip(answer, call, strict=False)) if a != b)
    assert TOKENIZER.decode(answer[:common]) == TOKENIZER.decode(call[:common]) != ""


@pytest.mark.parametrize("mode", ["low", "high", "answer", "call"])
def test_taught_ids_are_those_of_the_rollout(mode: str, tmp_path: Path) -> None:
    write_processor_files(TOKENIZER, tmp_path, 3136, 62720)
    rollout = RolloutTokenizer.load(tmp_path)
    for index in range(12):
        query = make_scene("train", 9, index).queries[0]
        turns = RENDERER.episode(query.question, query.answer, mode)  # type: ignore[arg-type]
        taught = assemble(turns, {"low": 3, "high": 12}, IMAGE)
        conversation = Conversation.start(
            query.question, PROFILE, Limits(resolution=mode if mode in ("low", "high") else "adaptive")
        )
        sent: list[int] = []
        for turn in turns:
            ask = conversation.ask()
            assert ask is not None
            text = ask.text("\0")
            for place, piece in enumerate(text.split("\0")):
                tokens = 12 if (ask.views and ask.views[0].kind == "high") else 3
                sent += [IMAGE] * tokens * (place > 0) + rollout.encode_trusted(piece)
            sent += turn.reply
            conversation = conversation.after(rollout.decode(turn.reply[:-1]))
        assert sent == taught.ids
        assert conversation.status == "answered" and conversation.answer == query.answer
        assert len(taught.views) == (2 if mode == "call" else 1)


def test_only_replies_are_taught() -> None:
    turns = RENDERER.episode("Price of TEA?", "1.23", "call", 0.25)
    sequence = assemble(turns, {"low": 4, "high": 16}, IMAGE)
    taught = [i for i, w in zip(sequence.ids, sequence.weights, strict=True) if w > 0]
    assert taught == [*turns[0].reply, *turns[1].reply]
    assert [i for i, w in zip(sequence.ids, sequence.weights, strict=True) if w == 0.25] == list(
        RENDERER.encode("1.23")
    )
    assert IMAGE not in taught


def test_the_call_is_what_the_protocol_reads() -> None:
    reply = parse_reply(PROFILE.reply_call(THINK_FIRST, RESIZE_CALL), PROFILE.offered)
    assert reply.error is None and reply.call == RESIZE_CALL
