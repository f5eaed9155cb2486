"""Bounds that configurations have in common. Imports nothing."""

from __future__ import annotations


def at_least(config: object, bound: int, *names: str) -> None:
    """Raises ValueError for the first of these fields that is below the bound."""
    for name in names:
        if not getattr(config, name) >= bound:
            raise ValueError(f"{name} = {getattr(config, name)}: must be {bound} or more")


def positive_or_none(config: object, *names: str) -> None:
    """Raises ValueError for the first of these fields that is given and not above 0."""
    for name in names:
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"{name} = {value}: must be positive")


def not_empty(config: object, *names: str) -> None:
    """Raises ValueError for the first of these texts that says nothing."""
    for name in names:
        if not getattr(config, name).strip():
            raise ValueError(f"{name} = {getattr(config, name)!r}: must not be empty; name one")
