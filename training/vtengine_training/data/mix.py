"""Which examples are used, by label: shares, made by leaving out what there is too much of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from vtengine_training.data.examples import Example


def mixed(
    examples: Sequence[Example], label: str, shares: Mapping[str, float], seed: int, section: str = "data"
) -> list[Example]:
    """The most examples, in their order, whose labels stand in the given shares (to within one example).

    What is left out is drawn at random from `seed`. Labels are compared as text, truth values as true and false.
    Raises ValueError for a label that no example has.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        if label in example.fields:
            by_label[label_text(example.fields[label])].append(place)
    for name in shares:
        if not by_label.get(name):
            found = ", ".join(f"{key} ({len(places)})" for key, places in sorted(by_label.items())) or "no labels"
            raise ValueError(f"{section}.mix.{name}: no example has {label} = {name}; there are {found}")
    whole = sum(shares.values())
    total = min(len(by_label[name]) * whole / share for name, share in shares.items())
    kept: list[int] = []
    for number, (name, share) in enumerate(shares.items()):
        places = by_label[name]
        count = min(len(places), max(1, round(total * share / whole)))
        rng = np.random.default_rng([seed, number])
        kept += [places[int(i)] for i in rng.choice(len(places), count, replace=False)]
    return [examples[place] for place in sorted(kept)]


def label_text(value: object) -> str:
    """A label as a configuration writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
