"""Which implementation of an op runs: what is available here, what is not and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Availability:
    """One implementation of one op. reason: how it was found, or why it is missing; cost: what is slower without."""

    op: str
    impl: str
    available: bool
    reason: str
    cost: str = ""


def report() -> list[Availability]:
    """Every implementation of every op, the preferred one of an op first."""
    return [Availability("patchify", "ref", True, "numpy")]


def choose(op: str, impl: str) -> str:
    """The implementation to run. ValueError: no such op or impl; RuntimeError: it is not available here."""
    known = [entry for entry in report() if entry.op == op]
    if not known:
        raise ValueError(f"op = {op!r}: must be one of {', '.join(sorted({entry.op for entry in report()}))}")
    if impl == "auto":
        return next(entry.impl for entry in known if entry.available)
    for entry in known:
        if entry.impl == impl:
            if not entry.available:
                raise RuntimeError(f"{op}: impl = {impl!r} is not available: {entry.reason}")
            return impl
    names = ", ".join(["auto", *(entry.impl for entry in known)])
    raise ValueError(f"{op}: impl = {impl!r}: must be one of {names}")
