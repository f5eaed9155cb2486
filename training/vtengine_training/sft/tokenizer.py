"""The shipped model's own small tokenizer: byte-level BPE, digits single, Qwen2.5-VL's special tokens by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vtengine.protocol.profile import Profile
from vtengine.protocol.tools import RESIZE_CALL
from vtengine_training.glance import make_scene
from vtengine_training.glance.scene import COLOURS, ITEMS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = ("<tool_call>", "</tool_call>")
VOCABULARY = 640
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINK_FIRST = "I look."
THINK_LARGE = "I look closer."

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type in ('image', 'image_url') or 'image' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def corpus(profile: Profile) -> Iterable[str]:
    """Texts whose words become tokens: the profile, the reply forms, the questions; no codes, no written words."""
    for _ in range(200):
        yield from profile.strings.values()
        yield from ("user", "assistant", "system")
        yield profile.reply_answer(THINK_FIRST, "")
        yield profile.reply_answer(THINK_LARGE, "")
        yield profile.reply_call(THINK_FIRST, RESIZE_CALL)
        yield from COLOURS
        yield from (f"Price of {item}?" for item in ITEMS)
    for index in range(1500):
        yield from (query.question for query in make_scene("train", 0, index).queries)


def train_tokenizer(profile: Profile) -> Tokenizer:
    """A fresh tokenizer; always the same for the same profile and generator."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        min_frequency=50,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(profile), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return tokenizer


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special and added tokens. Raises ValueError where one is missing."""
    ids = {token: tokenizer.token_to_id(token) for token in (*SPECIAL, *ADDED)}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise ValueError(f"tokenizer: lacks {missing}; train it with train_tokenizer")
    return {token: token_id for token, token_id in ids.items() if token_id is not None}


def write_processor_files(tokenizer: Tokenizer, folder: Path, min_pixels: int, max_pixels: int) -> None:
    """All of a checkpoint folder but the model: tokenizer, chat template, image processor, generation defaults."""
    ids = token_ids(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        str(ids[t]): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": t in SPECIAL,
        }
        for t in (*SPECIAL, *ADDED)
    }
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": described,
            "additional_special_tokens": list(SPECIAL[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 2048,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(
        folder / "preprocessor_config.json",
        {
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    _write(
        folder / "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
        },
    )


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
