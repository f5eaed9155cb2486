"""`vtengine view`: an HTML page of episodes."""

from __future__ import annotations

import argparse

from vtengine.cli.errors import OK, UsageError, one_line


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from vtengine.viewer import PageOptions, render_page

    source, target = arguments.input, arguments.output
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"-o {target}: is the input itself")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"-o {target}: cannot be written: {target.parent} is no folder")
    if arguments.image_root is not None and not arguments.image_root.is_dir():
        raise UsageError(f"--image-root {arguments.image_root}: is not a folder")
    options = PageOptions(arguments.title or source.name, arguments.image_root, arguments.max_mb * 2**20)
    try:
        totals = render_page(source, target, options)
    except (ValueError, OSError) as error:
        raise UsageError(one_line(error)) from None
    if target.is_file():
        print(f"{target}  ({totals.rows} rows, {target.stat().st_size / 2**20:.1f} MB)")
    return OK
