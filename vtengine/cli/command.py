"""The `vtengine` command: reads the arguments, runs one subcommand, turns errors into one line and an exit status.

Nothing heavy is imported here; each subcommand imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vtengine.cli.arguments import build_parser
from vtengine.cli.errors import INTERRUPTED, STOPPED, CliError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: sys.argv) and returns the exit status. argparse exits by SystemExit."""
    _open_streams()
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except CliError as error:
        return _say(str(error), error.status)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        return STOPPED
    except MemoryError:
        return _say("out of memory; lower --concurrency or use smaller images", STOPPED)
    except ModuleNotFoundError as error:
        return _say(f"{one_line(error)}; `vtengine doctor` says what is missing", STOPPED)
    except OSError as error:
        return _say(one_line(error), STOPPED)


def _open_streams() -> None:
    """Closed ones, as a daemon may have them, lead nowhere: else the next file or socket would take their number, and
    engines would print into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, so this one
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _say(message: str, status: int) -> int:
    print(f"vtengine: {message}", file=sys.stderr)
    return status
