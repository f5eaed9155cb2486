"""Command line: `vtengine generate | ask | view | bench | doctor`."""

from vtengine.cli.command import main

__all__ = ["main"]
