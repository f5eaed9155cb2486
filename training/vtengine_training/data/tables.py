"""Rows of parquet files and of saved Hugging Face datasets, as plain records; encoded images stay encoded.

Both are read in small batches, so memory does not grow with the file. pyarrow and datasets are imported when the first
such file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Record = dict[str, Any]
BATCH_ROWS = 32
MAX_ROW_GROUP_BYTES = 8 << 30
"""Uncompressed, as the file states it: what one step of reading may unpack at most."""


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or the parquet files of a folder and below it, sorted."""
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder: one data set, or several splits."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns. Raises ValueError for what is no parquet file, OSError where there is none."""
    return list(_open_parquet(path).schema_arrow.names)


def parquet_records(path: Path) -> Iterator[Record]:
    """Rows in file order. Raises ValueError for a damaged file."""
    arrow = need("pyarrow", path)
    parquet = _open_parquet(path)
    for index in range(parquet.metadata.num_row_groups):
        size = parquet.metadata.row_group(index).total_byte_size
        if size > MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"{path}: row group {index} unpacks to {size} bytes, at most {MAX_ROW_GROUP_BYTES} are read; "
                "write the file with smaller row groups"
            )
    try:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the parquet file is damaged: {error}; copy it again") from None


def saved_columns(folder: Path) -> list[str]:
    """Names of a saved dataset's columns. Raises ValueError for a folder of splits, naming them."""
    return list(_open_saved(folder).column_names)


def saved_records(folder: Path) -> Iterator[Record]:
    """Rows of a dataset saved with `save_to_disk`, memory-mapped; images come as {bytes, path}."""
    for table in _open_saved(folder).with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def _open_parquet(path: Path) -> Any:
    arrow = need("pyarrow", path)
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is no parquet file: {error}") from None


def _open_saved(folder: Path) -> Any:
    datasets = need("datasets", folder)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise ValueError(f"{folder}: cannot be read as a saved dataset: {type(error).__name__}: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{folder}: holds the splits {', '.join(found)}; name one, such as {folder / next(iter(found))}"
        )
    return found


def need(name: str, path: Path) -> ModuleType:
    """The library, imported now. path: the file that wants it. Raises ValueError naming the extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{path}: reading it needs {name}, which is missing; pip install 'vtengine[data]'") from None
