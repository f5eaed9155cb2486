"""Every flag of `vtengine`, with examples in each --help. Standard library only."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtengine.cli.errors import USAGE
from vtengine.cli.flags import RESOLUTIONS, add_engine, list_of, real, whole
from vtengine.config import hinted

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

_MEASURE = """examples:
  vtengine measure questions.jsonl --model ./Qwen2.5-VL-7B-Instruct
  vtengine measure questions.jsonl --against high                  does looking twice pay on these questions?
  vtengine measure questions.jsonl --concurrency 1,16,128 -o load.json --plot load.svg
  vtengine measure questions.jsonl --rate 2,4,8                    questions that come when they come
  vtengine measure questions.jsonl --chat http://127.0.0.1:8000/v1      vtengine serve, vLLM, SGLang, ...

input: as of `vtengine generate`. Each level of load is asked all the questions, in rounds that take turns, and finds
  the caches empty but for what all prompts begin with (a server behind --backend URL has its caches emptied too; one
  behind --chat is asked other questions each time, as long as there are any). Rates are medians over the rounds; all
  else is of all rounds.

exit status:
  0 done; 3 done, but some questions were rejected or failed (they are in no figure); 2 bad usage; 1 the run had to
  stop; 130 Ctrl-C, 143 SIGTERM. After 1, 130 and 143 the rounds measured until then are shown and written, and
  RESULT.json says `"finished": false`"""

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
    _add_ask(_command(commands, "ask", "answer one question, about one image or none", _ASK))
    _add_serve(_command(commands, "serve", "answer over HTTP, as OpenAI's chat completions do", _SERVE))
    _add_view(_command(commands, "view", "make an HTML page of the episodes in a file", _VIEW))
    _add_measure(_command(commands, "measure", "measure throughput and latency on a file of questions", _MEASURE))
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
    add_engine(parser)
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
    add_engine(parser)
    parser.add_argument("--n", type=whole(1), default=1, metavar="N", help="samples per question (default: 1)")
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="images outside it are rejected (default: IN's folder); relative paths always start at IN's folder",
    )
    parser.add_argument(
        "--concurrency",
        type=whole(1),
        metavar="N",
        help="episodes at a time (default: 32; 128 per GPU or SGLang server)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue OUT.jsonl where an interrupted run stopped, and retry its failed rows",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _add_measure(parser: Parser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="IN.jsonl", help="questions, one JSON object per line (.gz too)")
    add("--questions", type=whole(1), default=256, metavar="N", help="of the file, the first ones (default: 256)")
    add(
        "--concurrency",
        type=list_of(whole(1)),
        metavar="N[,N...]",
        help="questions at a time, one level of load each (default: 1,8,32; 1,32,128 on a GPU)",
    )
    add(
        "--rate",
        type=list_of(real(0.0, 1e6, open_low=True)),
        metavar="R[,R...]",
        help="questions per second that come at random times, one level each (default: none)",
    )
    add("--against", choices=RESOLUTIONS, help="measure this resolution too, round by round with the other")
    add("--rounds", type=whole(1), default=3, metavar="N", help="times that each level is measured (default: 3)")
    add("-o", "--output", type=Path, metavar="RESULT.json", help="every figure, with settings, machine and versions")
    add("--rows", type=Path, metavar="ROWS.jsonl", help="every row behind the figures, as of `vtengine generate`")
    add("--plot", type=Path, metavar="FILE", help="latency over throughput, as .svg or .png (needs matplotlib)")
    add(
        "--chat",
        metavar="URL",
        help="measure a server with OpenAI's chat completions, such as http://127.0.0.1:8000/v1, as its clients see "
        "it; --deadline-s is then of a question",
    )
    add("--quiet", action="store_true", help="no progress")
    add("--image-root", type=Path, metavar="DIR", help="images outside it are rejected (default: IN's folder)")
    add_engine(parser)
    parser.set_defaults(n=1)  # one sample of each


def _add_ask(parser: Parser) -> None:
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help=f"path of an image, or with --allow-http its address; {NO_IMAGE} asks without one",
    )
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    add_engine(parser)


def _add_serve(parser: Parser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=whole(0), default=8000, help="0 takes any free one (default: 8000)")
    add("--served-name", metavar="NAME", help="what clients call the model (default: last part of --model)")
    add("--api-key-file", type=Path, metavar="FILE", help="a file with one API key per line")
    add("--api-key-env", metavar="NAME", help="an environment variable that holds an API key")
    add("--config", type=Path, metavar="FILE.toml", help="limits on requests, see below")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one limit; may be given several times")
    add_engine(parser, seed=None, engines=1)


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
        "--max-mb", type=whole(0), default=96, metavar="MB", help="limit on all pictures together (default: 96)"
    )
