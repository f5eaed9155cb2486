"""Flags that several commands share: which model, what it may do, how tokens are sampled, where it runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

RESOLUTIONS = ("adaptive", "low", "high")
DTYPES = ("auto", "float32", "bfloat16")


def add_engine(parser: argparse.ArgumentParser, seed: int | None = 0, engines: int = 0) -> None:
    """Those of every command that answers questions."""
    add = parser.add_argument
    add(
        "--model",
        default="glance",
        metavar="MODEL",
        help="a folder, a Hugging Face id, or glance (default: the shipped model)",
    )
    add(
        "--backend",
        default="embedded",
        metavar="NAME",
        help="embedded (default), sglang, or the URL of a server; several URLs with commas between",
    )
    add("--profile", metavar="NAME", help="prompt profile, a name or a TOML file (default: the model's own)")
    add(
        "--resolution",
        choices=RESOLUTIONS,
        default="adaptive",
        help="low view first, or one view only (default: adaptive)",
    )
    add("--max-turns", type=whole(1), default=2, metavar="N", help="turns per episode (default: 2)")
    add(
        "--visual-token-budget",
        type=whole(1),
        metavar="N",
        help="visual tokens an episode may spend (default: no limit)",
    )
    add(
        "--scale",
        type=real(0.5, 1.0, open_low=True),
        metavar="S",
        help="largest view of a whole image, as a share of the high view's sides (default: 1)",
    )
    add("--max-new-tokens", type=whole(1), default=512, metavar="N", help="tokens per turn (default: 512)")
    add("--temperature", type=real(0.0, 100.0), default=0.0, metavar="T", help="0 is greedy (default: 0)")
    add(
        "--top-p",
        type=real(0.0, 1.0, open_low=True),
        default=1.0,
        metavar="P",
        help="nucleus sampling (default: 1, off)",
    )
    add("--top-k", type=whole(0), default=0, metavar="K", help="sample among the K best (default: 0, off)")
    stated = "another for each request" if seed is None else seed
    add("--seed", type=whole(0), default=seed, metavar="S", help=f"same seed, same samples (default: {stated})")
    _add_machine(parser, engines)
    add("--allow-http", action="store_true", help="fetch images from http(s) addresses in the input")
    add(
        "--allow-private-hosts",
        action="store_true",
        help="with --allow-http: from private networks too; only where you trust whoever names the addresses",
    )


def _add_machine(parser: argparse.ArgumentParser, engines: int) -> None:
    """Where the model runs, and with which memory."""
    add = parser.add_argument
    add("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:1")
    add(
        "--data-parallel",
        type=whole(0),
        default=engines,
        metavar="N",
        help="engines side by side, each a process with a GPU or a share of the cores; "
        f"0: one in this process (default: {engines})",
    )
    add(
        "--image-device",
        choices=("auto", "cpu"),
        default="auto",
        help="where pixel values are made (auto: on the GPU of a model in this process, else on the CPU)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights (auto: bfloat16 on CUDA; on a CPU float32, but from 1 GiB of bfloat16 weights on bfloat16 "
        "where the processor has AVX-512 BF16)",
    )
    add(
        "--kv-gb",
        type=real(0.0, 1e6, open_low=True),
        metavar="GB",
        help="GiB for keys and values, per engine (default: on a GPU 60%% of what the weights leave, else at most 1)",
    )
    add("--no-cuda-graphs", action="store_true", help="decode on a GPU without CUDA graphs: slower, for debugging")
    add(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of SGLang's engine, with --backend sglang: tp_size=2; may be given several times",
    )
    add(
        "--deadline-s",
        type=real(0.0, 1e6),
        metavar="S",
        help="seconds that a turn may take with SGLang before it fails, 0 for no limit (default: 600)",
    )


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return value

    return parse


def real(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number {'>' if open_low else '>='} {low:g} and <= {high:g}"
            )
        return value

    return parse


def list_of(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values with commas between them."""
    return lambda text: [parse(part.strip()) for part in text.split(",")]
