"""Tables of rich: as it draws them on a terminal; in a file or a pipe without spaces at the ends of lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table, width: int, stream: TextIO | None = None) -> None:
    """stream: default stdout. width: in characters, where it is no terminal, which has its own."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = width
    with console.capture() as drawn:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))
