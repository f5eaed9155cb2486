"""New weights for SGLang, from a folder that it reads itself; what does not fit is refused before it sees it.

A tensor that SGLang does not know, or of another shape, kills its scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vtengine.model import ModelConfig, checkpoint_name, hf_tensors, meta_model

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
VISION = "visual."
SHOWN = 5


@contextmanager
def folder_of(source: Path | Mapping[str, Tensor], config: ModelConfig | None, shared: Path | None) -> Iterator[Path]:
    """A folder with `source` in it, checked. Tensors are written to a folder in `shared` (None: of this machine).

    Raises ValueError.
    """
    if not isinstance(source, Mapping):
        folder = Path(source)
        check_shapes(read_shapes(folder), config, str(folder))
        yield folder.resolve()
        return
    named = {checkpoint_name(name): tensor.detach().cpu().contiguous() for name, tensor in source.items()}
    check_shapes({name: tuple(tensor.shape) for name, tensor in named.items()}, config, "weight update")
    with TemporaryDirectory(prefix="vtengine-weights-", dir=shared) as name:
        save_file(named, Path(name) / "model.safetensors", metadata={"format": "pt"})
        yield Path(name)


def touches_vision(source: Path | Mapping[str, Tensor]) -> bool:
    """Whether these weights may change what the vision tower computes; a folder is a whole checkpoint."""
    return not isinstance(source, Mapping) or any(checkpoint_name(name).startswith(VISION) for name in source)


def read_shapes(folder: Path) -> Shapes:
    """Name -> shape of all tensors in the folder's *.safetensors. Raises ValueError."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: holds no *.safetensors; give the folder of a checkpoint")
    shapes: Shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors: {error}") from None
    return shapes


def check_shapes(shapes: Shapes, config: ModelConfig | None, where: str) -> None:
    """Raises ValueError for names that no released checkpoint has, unknown tensors and other shapes."""
    renamed = [name for name in shapes if checkpoint_name(name) != name]
    if renamed:
        raise ValueError(
            f"{where}: {_some(renamed)} are names of transformers 5, which SGLang does not know; "
            "save the model with vtengine.model.save_model"
        )
    if config is None:
        return
    wanted = _shapes_of(config)
    wrong = [name for name, shape in shapes.items() if wanted.get(name) != shape]
    if wrong:
        figures = [f"{name} {list(shapes[name])} (ours: {list(wanted.get(name, ())) or 'none'})" for name in wrong]
        raise ValueError(f"{where}: {len(wrong)} tensors do not fit the model: {_some(figures)}")


@lru_cache(maxsize=4)
def _shapes_of(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Building a model of billions, though without memory, takes a second: not for every bucket of an update."""
    wanted = {name: tuple(tensor.shape) for name, tensor in hf_tensors(meta_model(config)).items()}
    wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
    return wanted


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
