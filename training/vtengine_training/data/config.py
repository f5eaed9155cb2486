"""Where examples come from: files or generated questions, which columns mean what, which rows are used. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vtengine_training.checks import at_least


@dataclass(frozen=True)
class GlanceData:
    """Questions of the generated world, written below the data folder when they are not there yet.

    crops: a cold start on them (`loss.algorithm = "sft"`) teaches to ask for the part of the picture that must be seen
    closer, not for the whole (with the profile glance-crop).
    """

    seed: int = 2
    count: int = 4000
    crops: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "count")


@dataclass(frozen=True)
class SourceConfig:
    """files: JSONL, parquet, folders of parquet, folders of `datasets.save_to_disk`. Or `glance`: generated questions.

    columns: our name = theirs, for example question = "problem"; "info.use_tool" reaches into a struct. Ours are id,
    image, question and answer; any other name becomes a field of the example. Columns not named keep their names.
    image_root: a folder that holds the images, as of `vtengine generate`: paths still begin at their file's folder, and
    none may lead out of it. Empty: each file's own folder.
    remove: texts taken out of questions, such as "<image>". max_rows: rows read; None = all.
    label: the field that `mix` is about. mix: label = share; rows with other labels are left out, and at random those
    of labels of which there are too many. A single label is a filter. Empty: every row, whatever its label.
    """

    files: tuple[str, ...] = ()
    glance: GlanceData | None = None
    columns: dict[str, str] = field(default_factory=dict)
    image_root: str = ""
    remove: tuple[str, ...] = ()
    max_rows: int | None = None
    label: str = "label"
    mix: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows = {self.max_rows}: must be 1 or more")
        for ours, theirs in self.columns.items():
            if not ours.strip() or not all(theirs.split(".")):
                raise ValueError(f"columns.{ours} = {theirs!r}: must name a column, or a part of one as column.part")
        for name, share in self.mix.items():
            if not (share > 0 and math.isfinite(share)):
                raise ValueError(f"mix.{name} = {share}: must be a positive share; leave a label out to get none of it")
        if not all(self.remove):
            raise ValueError(f"remove = {list(self.remove)}: must hold texts that are not empty")

    def require_source(self, section: str) -> None:
        """Raises ValueError unless exactly one of files and glance is given. section: for the remedy."""
        if bool(self.files) == (self.glance is not None):
            raise ValueError(
                f"files: name JSONL, parquet or saved datasets, or give a [{section}.glance] section, and not both"
            )


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The examples of a training run. seed: of their order and of the mix.

    folder: where generated questions and images out of parquet and datasets go; runs may share it. Empty = `data` in
    the run's output.
    """

    seed: int = 0
    folder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "seed")
        self.require_source("data")
