"""Text to ids and back. Ids of special tokens come from trusted text only, whatever a question or a reply spells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from vtengine.protocol.messages import Text

TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
NEVER_SAMPLED = (TURN_START, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
CONFIG_IDS = {
    "image_token_id": IMAGE_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "video_token_id": "<|video_pad|>",
}


def _byte_alphabet() -> dict[str, int]:
    """The letter by which a byte-level vocabulary writes each byte: itself where it can be printed, else one beyond."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """A `tokenizer.json` with the special tokens of Qwen2.5, which are Qwen3's too.

    image_pad_id: one per visual token. turn_end_id: closes every turn. stop_ids: end a reply, turn_end_id first.
    banned_ids: markers that must never be sampled.
    """

    def __init__(self, encoder: Encoder) -> None:
        # Special tokens are placed by us, so the encoder itself reads all text as plain text, at all times.
        encoder.encode_special_tokens = True
        encoder.no_padding()
        encoder.no_truncation()
        self._encoder = encoder
        added = encoder.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(self._special.values())
        self._marks = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)")
        self.image_pad_id = self._required(IMAGE_PAD)
        self.turn_end_id = self._required(TURN_END)
        self._required(TURN_START)
        end = self._special.get(END_OF_TEXT)
        self.stop_ids = (self.turn_end_id,) if end is None else (self.turn_end_id, end)
        self.banned_ids = frozenset(self._special[name] for name in NEVER_SAMPLED if name in self._special)

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Reads tokenizer.json; config.json, where it is there, must name the same ids. Raises ValueError."""
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"model {folder}: has no tokenizer.json; give a folder in the Hugging Face format")
        try:
            encoder = Encoder.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from None
        tokenizer = cls(encoder)
        tokenizer._check_config(folder / "config.json")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may have more rows."""
        return self._encoder.get_vocab_size()

    def special_id(self, token: str) -> int | None:
        """The id of a special token, None if there is no such token."""
        return self._special.get(token)

    def encode(self, texts: Iterable[Text]) -> list[int]:
        """Ids of consecutive texts: those of the whole string, except that untrusted text yields no special token.

        Plain text between two special tokens is encoded in one piece, across the texts' borders.
        """
        ids: list[int] = []
        run: list[str] = []
        for text in texts:
            if not text.trusted:
                run.append(text.text)
                continue
            start = 0
            for mark in self._marks.finditer(text.text):
                run.append(text.text[start : mark.start()])
                ids += self._plain("".join(run))
                ids.append(self._special[mark[0]])
                run, start = [], mark.end()
            run.append(text.text[start:])
        return ids + self._plain("".join(run))

    def encode_trusted(self, text: str) -> list[int]:
        """Our own text: special tokens become their ids."""
        return self.encode((Text(text),))

    def encode_untrusted(self, text: str) -> list[int]:
        """The user's text: no special token, whatever it spells."""
        return self._plain(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._encoder.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character; unknown ids have none. `decode` reads
        those of all its ids, joined."""
        token = self._encoder.id_to_token(token_id) or ""
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:  # not of the byte-level alphabet: it stands for itself
            return token.encode("utf-8")

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        assert self.special_ids.isdisjoint(ids), "plain text became a special token"
        return ids

    def _required(self, token: str) -> int:
        if token not in self._special:
            raise ValueError(f"tokenizer: has no special token {token}; it must be one of the Qwen2.5 kind")
        return self._special[token]

    def _check_config(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            config: Mapping[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as a JSON object: {error}") from None
        for key, token in CONFIG_IDS.items():
            ours, theirs = self._special.get(token), config.get(key)
            if theirs is not None and ours is not None and theirs != ours:
                raise ValueError(f"{path}: {key} = {theirs}, but {token} is {ours} in tokenizer.json")


class StreamDecoder:
    """Decodes ids as they come. The pieces, joined, are the decoding of all ids at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """New text; ids that end inside a character wait for the rest of it."""
        self._pending += token_ids
        text = self._tokenizer.decode(self._pending)
        if not text or text.endswith("\ufffd"):
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """What is left at the end."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
