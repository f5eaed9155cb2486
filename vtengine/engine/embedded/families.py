"""Which rows of a pass have their first pages in common, found anew only when other rows run."""

from __future__ import annotations

from torch import Tensor
from vtengine_kernels.prefix_attention import Crossover, Siblings, crossover


class Families:
    """Siblings among rows, known by the lists of pages that their sequences hold.

    A sequence gets a new list whenever it is admitted; until then pages are only added at its end, and those are its
    own. So rows with the same lists have the same siblings.
    """

    def __init__(self, page_size: int, crossover: Crossover | None, steady: bool = False) -> None:
        self._page_size = page_size
        self._crossover = crossover
        self._steady = steady
        self._tables: list[list[int]] = []
        self._found: Siblings | None = None

    @staticmethod
    def for_cache(keys: Tensor, page_size: int, share: bool | None) -> Families:
        """keys: of a layer. share: always or never; None: where a measurement says that it pays.

        On a GPU the kernel that knows siblings rounds otherwise than those that do not. There it gets all rows,
        strangers too, so that a sample does not depend on who else is in the batch.
        """
        found = crossover(keys) if share is None else Crossover() if share else None
        return Families(page_size, found, steady=keys.is_cuda)

    def of(self, tables: list[list[int]]) -> Siblings | None:
        """tables: the list of pages of each row. None: nobody shares enough."""
        if self._crossover is None:
            return None
        known = self._tables
        if len(tables) != len(known) or any(a is not b for a, b in zip(tables, known, strict=True)):
            found = Siblings.of(tables, self._page_size, self._crossover)
            self._tables = tables
            self._found = Siblings.strangers(len(tables)) if found is None and self._steady else found
        return self._found

    def forget(self) -> None:
        self._tables, self._found = [], None
