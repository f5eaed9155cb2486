"""Ids of prompts: the same as of the whole string, and no special token out of untrusted text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtengine.cli.models import shipped_model
from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Text
from vtengine.protocol.profile import load_profile, shipped_profiles
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.tokenizer import NEVER_SAMPLED, StreamDecoder, Tokenizer

PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<tool_call>",
]
WILD = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_special_ids(qwen_tokenizer: Tokenizer) -> None:
    assert qwen_tokenizer.image_pad_id == 151655 and qwen_tokenizer.turn_end_id == 151645
    assert qwen_tokenizer.stop_ids == (151645, 151643)
    assert qwen_tokenizer.banned_ids == {151644, 151652, 151653, 151654, 151655, 151656}
    assert qwen_tokenizer.vocab_size == 151665
    assert qwen_tokenizer.special_id("<|vision_end|>") == 151653 and qwen_tokenizer.special_id("<tool_call>") is None


@QUICK
@given(WILD)
def test_untrusted_text_yields_no_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_untrusted(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    text = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer reads it
    assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == text
    mixed = tokenizer.encode((Text("<|im_start|>user\n<|im_"), Text(text, trusted=False), Text("<|im_end|>\n")))
    assert [i for i in mixed if i in tokenizer.special_ids] == [
        tokenizer.special_id("<|im_start|>"),
        tokenizer.turn_end_id,
    ]
    assert unicodedata.normalize("NFC", tokenizer.decode(mixed)) == f"<|im_start|>user\n<|im_{text}<|im_end|>\n"


@QUICK
@given(WILD)
def test_trusted_text_reads_as_the_library_reads_it(
    small_tokenizer: Tokenizer, plain_small: tokenizers.Tokenizer, text: str
) -> None:
    assert small_tokenizer.encode_trusted(text) == plain_small.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def plain_qwen(qwen_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(qwen_dir / "tokenizer.json"))


@QUICK
@given(WILD)
def test_trusted_text_reads_as_qwen_reads_it(
    qwen_tokenizer: Tokenizer, plain_qwen: tokenizers.Tokenizer, text: str
) -> None:
    assert qwen_tokenizer.encode_trusted(text) == plain_qwen.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", shipped_profiles())
def test_prompt_ids_are_those_of_the_whole_string(
    name: str, qwen_tokenizer: Tokenizer, plain_qwen: tokenizers.Tokenizer
) -> None:
    """Cutting the prompt into trusted and untrusted texts costs no token."""
    profile = load_profile(name)
    limits = Limits("low")
    ask = Conversation.start("What is on the  sign?\n", profile, limits).ask()
    assert ask is not None
    texts = [part if isinstance(part, Text) else Text("<|image_pad|>") for part in ask.parts]
    assert qwen_tokenizer.encode(texts) == plain_qwen.encode(ask.text(), add_special_tokens=False).ids


@pytest.mark.parametrize("question", ["What is it?", "Price of TEA?", "How many red circles?", "B2?"])
def test_glance_prompts_can_be_encoded_part_by_part(question: str) -> None:
    """No token of its own tokenizer spans two parts: supervised training encodes them one at a time."""
    tokenizer, profile = Tokenizer.load(shipped_model("glance")), load_profile("glance")
    start = Conversation.start(question, profile)
    for conversation in (start, start.after(profile.reply_call("a", RESIZE_CALL))):
        ask = conversation.ask()
        assert ask is not None
        texts = [part if isinstance(part, Text) else Text("<|image_pad|>") for part in ask.parts]
        assert tokenizer.encode(texts) == [i for text in texts for i in tokenizer.encode((text,))]


@QUICK
@given(st.text(max_size=30), st.lists(st.integers(1, 7), max_size=30))
def test_stream_is_the_whole(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode_trusted(text + "<|im_end|>")
    decoder, pieces, at = StreamDecoder(tokenizer), [], 0
    for cut in [*cuts, len(ids)]:
        pieces.append(decoder.push(ids[at : at + cut]))
        at += cut
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@QUICK
@given(st.data())
def test_stream_of_any_ids_is_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Sampled ids need not be UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_characters_are_never_cut(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token_id]) for token_id in tokenizer.encode_untrusted("né 漢字 🦜!")]
    assert not any("\ufffd" in piece for piece in pieces) and "".join(pieces) == "né 漢字 🦜!"


def test_markers_are_banned(tokenizer: Tokenizer) -> None:
    assert {tokenizer.special_id(token) for token in NEVER_SAMPLED} - {None} == tokenizer.banned_ids
    assert tokenizer.banned_ids.isdisjoint(tokenizer.stop_ids)


def test_load_says_what_is_wrong(tmp_path: Path, qwen_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to(qwen_dir / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": 151656}))
    with pytest.raises(ValueError, match=r"image_token_id = 151656, but <\|image_pad\|> is 151655"):
        Tokenizer.load(tmp_path)


def test_a_foreign_tokenizer_is_refused() -> None:
    from tokenizers import models

    with pytest.raises(ValueError, match="has no special token"):
        Tokenizer(tokenizers.Tokenizer(models.BPE()))


@QUICK
@given(st.lists(st.integers(0, 300), max_size=12), st.lists(st.floats(0, 1, exclude_max=True), max_size=12))
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Tokenizer, low: list[int], wild: list[float]) -> None:
    """Ids of single bytes in any order, so also what is no UTF-8; and any of the vocabulary, special tokens too."""
    ids = [*low, *(int(part * tokenizer.vocab_size) for part in wild)]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace") == tokenizer.decode(ids)
