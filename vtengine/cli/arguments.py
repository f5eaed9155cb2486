"""Every flag of `vtengine`, with examples in each --help. Standard library only."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtengine.cli.errors import USAGE
from vtengine.config import hinted

RESOLUTIONS = ("adaptive", "low", "high")
DTYPES = ("auto", "float32", "bfloat16")
NO_IMAGE = "none"
"""In place of a path; a file of that name is ./none."""

_EXIT_STATUSES = """exit status:
  0 every row was processed; 3 some were rejected or failed (each has a row with its code); 2 bad usage;
  1 the run had to stop (disk full, engine broke); 130 Ctrl-C, 143 SIGTERM. After 1, 130 and 143, --resume continues;
  without it an older OUT.jsonl is kept as OUT.jsonl.previous, the next one as OUT.jsonl.previous.2, and so on."""

_GENERATE = f"""examples:
  vtengine generate questions.jsonl -o answers.jsonl --model glance
  vtengine generate questions.jsonl -o answers.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --data-parallel 8
  vtengine generate questions.jsonl -o answers.jsonl --model glance --n 8 --temperature 1 --seed 7
  vtengine generate questions.jsonl -o answers.jsonl --model glance --resume      continues after Ctrl-C or a crash

input, one JSON object per line:
  {{"image": "cat.jpg", "question": "What is it?"}}      also: "id", "answer" (to score); other keys are carried through
  {{"question": "How much is 2 + 2?"}}                   about text alone: no "image", or null there; one turn, no view

output, one JSON object per line and sample, in input order: id, sample, status, error, answer, upscaled, turns with
  their token account, visual_tokens, visual_tokens_full (what always-high costs), latency_s, logprob_sum, the carried
  keys, image_path (relative to OUT's folder), and if the row had an answer: expected, correct (rows that were rejected
  or failed are neither right nor wrong, and do not count in the accuracy)

{_EXIT_STATUSES}"""

_ASK = """examples:
  vtengine ask receipt.png "What is the total?"
  vtengine ask receipt.png "What is the total?" --resolution high --model ./Qwen2.5-VL-3B-Instruct
  vtengine ask none "How many cents are in 12.50 euros?" --model ./Qwen2.5-VL-3B-Instruct"""

_SERVE = """examples:
  vtengine serve                                            then open http://127.0.0.1:8000/
  vtengine serve --host 0.0.0.0 --api-key-file keys.txt --set max_waiting=64
  curl http://127.0.0.1:8000/v1/models

clients: any that speaks OpenAI's /v1/chat/completions; the base URL ends in /v1. More in docs/serving.md.
limits for --config and --set: max_body_bytes, max_image_bytes, max_image_pixels, max_images, max_text_chars,
  max_choices, max_running, max_waiting, max_held_bytes, request_timeout_s, drain_s, max_text_events_per_s,
  keep_alive_s, retry_after_s"""

_VIEW = """examples:
  vtengine view answers.jsonl -o answers.html
  vtengine view answers.jsonl -o answers.html --image-root ./images      if images have moved since the run"""

_BENCH = """examples:
  vtengine bench --list
  vtengine bench patchify
  vtengine bench patchify --quick"""

_DOCTOR = """examples:
  vtengine doctor
  vtengine doctor --json      for bug reports"""

_MAIN = """examples:
  vtengine doctor
  vtengine ask photo.jpg "What is written on the sign?"
  vtengine generate questions.jsonl -o answers.jsonl && vtengine view answers.jsonl -o answers.html

`vtengine COMMAND --help` explains a command."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and name the nearest flag, command or choice where one is unknown."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command answers for its own arguments: the parser above it does not know its flags."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            given = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
            self.error(hinted(f"unrecognized arguments: {' '.join(unknown)}", given, self._option_string_actions))
        return known, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            message = hinted(error.message, str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, message) from None

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE)


def build_parser() -> Parser:
    """The parser of all subcommands; `arguments.run(arguments)` runs the chosen one."""
    summary = "Answers questions about images: a quarter of the pixels first, all of them only when the model asks."
    parser = Parser("vtengine", description=summary, epilog=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"vtengine {installed_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_generate(_command(commands, "generate", "answer a file of image questions", _GENERATE))
    _add_ask(_command(commands, "ask", "answer one question about one image", _ASK))
    _add_serve(_command(commands, "serve", "answer over HTTP, as OpenAI's chat completions do", _SERVE))
    _add_view(_command(commands, "view", "make an HTML page of the episodes in a file", _VIEW))
    bench = _command(commands, "bench", "run a benchmark (in a source checkout)", _BENCH)
    bench.add_argument("suite", nargs="?", metavar="SUITE", help="name of a suite, see --list")
    bench.add_argument("--list", action="store_true", help="list the suites")
    bench.add_argument("--quick", action="store_true", help="a quick look: little work, no tests first, no result file")
    doctor = _command(commands, "doctor", "show what is installed, what is missing and what that slows down", _DOCTOR)
    doctor.add_argument("--json", action="store_true", help="as JSON, for programs and bug reports")
    return parser


class _Options(Parser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def engine_options(flags: Sequence[str]) -> argparse.Namespace:
    """The flags that `generate`, `ask` and `serve` share, without a command around them. Raises ValueError."""
    parser = _Options("options", allow_abbrev=False)  # keywords of a call mean the same whatever is added
    _add_engine(parser)
    return parser.parse_args(flags)


def installed_version() -> str:
    try:
        return importlib.metadata.version("vtengine")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from source)"


def _command(commands: argparse._SubParsersAction[Parser], name: str, summary: str, examples: str) -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    capital = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=capital, epilog=examples, formatter_class=raw)

    def run(arguments: argparse.Namespace) -> int:
        status: int = importlib.import_module(f"vtengine.cli.{name}").run(arguments)
        return status

    parser.set_defaults(run=run)
    return parser


def _add_generate(parser: Parser) -> None:
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="questions, one JSON object per line (.gz too)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl", help="one row per answer")
    _add_engine(parser)
    parser.add_argument("--n", type=_whole(1), default=1, metavar="N", help="samples per question (default: 1)")
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="images outside it are rejected (default: IN's folder); relative paths always start at IN's folder",
    )
    parser.add_argument(
        "--concurrency",
        type=_whole(1),
        metavar="N",
        help="episodes at a time (default: 32; 128 per GPU or SGLang server)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue OUT.jsonl where an interrupted run stopped, and retry its failed rows",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _add_ask(parser: Parser) -> None:
    parser.add_argument("image", metavar="IMAGE", help=f"path of an image; {NO_IMAGE} asks without one")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    _add_engine(parser)


def _add_serve(parser: Parser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_whole(0), default=8000, help="0 takes any free one (default: 8000)")
    add("--served-name", metavar="NAME", help="what clients call the model (default: last part of --model)")
    add("--api-key-file", type=Path, metavar="FILE", help="a file with one API key per line")
    add("--api-key-env", metavar="NAME", help="an environment variable that holds an API key")
    add("--config", type=Path, metavar="FILE.toml", help="limits on requests, see below")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one limit; may be given several times")
    _add_engine(parser, seed=None, engines=1)


def _add_engine(parser: Parser, seed: int | None = 0, engines: int = 0) -> None:
    """Flags that `generate`, `ask` and `serve` share: which model, what the model may do, how tokens are sampled."""
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
    add("--max-turns", type=_whole(1), default=2, metavar="N", help="turns per episode (default: 2)")
    add(
        "--visual-token-budget",
        type=_whole(1),
        metavar="N",
        help="visual tokens an episode may spend (default: no limit)",
    )
    add(
        "--scale",
        type=_real(0.5, 1.0, open_low=True),
        metavar="S",
        help="largest view of a whole image, as a share of the high view's sides (default: 1)",
    )
    add("--max-new-tokens", type=_whole(1), default=512, metavar="N", help="tokens per turn (default: 512)")
    add("--temperature", type=_real(0.0, 100.0), default=0.0, metavar="T", help="0 is greedy (default: 0)")
    add(
        "--top-p",
        type=_real(0.0, 1.0, open_low=True),
        default=1.0,
        metavar="P",
        help="nucleus sampling (default: 1, off)",
    )
    add("--top-k", type=_whole(0), default=0, metavar="K", help="sample among the K best (default: 0, off)")
    stated = "another for each request" if seed is None else seed
    add("--seed", type=_whole(0), default=seed, metavar="S", help=f"same seed, same samples (default: {stated})")
    _add_machine(parser, engines)
    add("--allow-http", action="store_true", help="fetch images from http(s) addresses in the input")
    add(
        "--allow-private-hosts",
        action="store_true",
        help="with --allow-http: from private networks too; only where you trust whoever names the addresses",
    )


def _add_machine(parser: Parser, engines: int) -> None:
    """Where the model runs, and with which memory."""
    add = parser.add_argument
    add("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:1")
    add(
        "--data-parallel",
        type=_whole(0),
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
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: float32 on CPU, bfloat16 on CUDA)")
    add(
        "--kv-gb",
        type=_real(0.0, 1e6, open_low=True),
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
        type=_real(0.0, 1e6),
        metavar="S",
        help="seconds that a turn may take with SGLang before it fails, 0 for no limit (default: 600)",
    )


def _add_view(parser: Parser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="OUT.jsonl", help="rows written by `vtengine generate` or a training run"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.html", help="the page")
    parser.add_argument("--title", help="heading of the page (default: the input's name)")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where the images are (default: where the run read them)"
    )
    parser.add_argument(
        "--max-mb", type=_whole(0), default=96, metavar="MB", help="limit on all pictures together (default: 96)"
    )


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return value

    return parse


def _real(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
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
