"""What would end a command at its start, of what is seen without loading anything: `--dry-run` says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vtengine_training.data.config import SourceConfig
from vtengine_training.data.tables import is_saved_dataset
from vtengine_training.lora.config import LoraConfig
from vtengine_training.packages import check_installed, is_installed
from vtengine_training.rewards.rewarder import RewardConfig

Check = Callable[[], object]


def absent_files(section: str, source: SourceConfig) -> Iterator[str]:
    """Those of `source`, the config's [section]."""
    yield from (f"{section}.files: {name}: no such file or folder" for name in source.files if not Path(name).exists())
    if source.image_root and not Path(source.image_root).is_dir():
        yield f"{section}.image_root: {source.image_root}: no such folder"


def refused(*checks: Check) -> Iterator[str]:
    """What the checks raise ValueError for."""
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def of_model(name: str, field: str = "model") -> Iterator[Check]:
    """That it is a checkpoint's folder, or could be fetched from the hub, which it is not."""
    from vtengine.cli.models import is_hub_id
    from vtengine_training.eval.runner import model_folder

    yield partial(_check_client if is_hub_id(name) else model_folder, name, field)


def _check_client(name: str, field: str) -> None:
    if not is_installed("huggingface_hub"):
        raise ValueError(f"{field}: no folder {name} here; to fetch it from Hugging Face: pip install 'vtengine[hf]'")


def of_backend(name: str) -> Iterator[Check]:
    """That SGLang is installed, where it is to run in this process; where it is elsewhere, an HTTP client."""
    from vtengine.engine.sglang.inprocess import installed_version

    if name == "sglang":
        yield installed_version
    elif name != "embedded":
        yield partial(check_installed, "httpx", "sglang", f"backend {name}")


def of_data(section: str, source: SourceConfig) -> Iterator[Check]:
    """That what reads these files is installed."""
    folders = [path for path in map(Path, source.files) if path.is_dir()]
    if any(map(is_saved_dataset, folders)):
        yield partial(check_installed, "datasets", "data", f"{section}.files")
    elif folders or any(name.endswith(".parquet") for name in source.files):
        yield partial(check_installed, "pyarrow", "data", f"{section}.files")


def of_lora(lora: LoraConfig) -> Iterator[Check]:
    """That peft is installed, where adapters are trained."""
    if lora.rank:
        yield partial(check_installed, "peft", "lora", f"lora.rank = {lora.rank}")


def of_reward(reward: RewardConfig) -> Iterator[Check]:
    """That the user's function is found, and the judge's client."""
    from vtengine_training.rewards.user import load_function

    if reward.function:
        yield partial(load_function, reward.function)
    if reward.uses_judge:
        yield partial(check_installed, "openai", "judge", f"reward.accuracy = {reward.accuracy!r}")


def of_profile(name: str) -> Iterator[Check]:
    """That it can be read; empty = the model's own."""
    from vtengine.protocol.profile import load_profile

    if name:
        yield partial(load_profile, name)


def end_dry_run(config: Path, plan: list[str], missing: list[str]) -> int:
    """Prints both as comments. Returns 0, or raises ValueError that says why the command would not start."""
    lines = plan + [f"MISSING: {what}" for what in missing]
    print("\n".join(f"# {line}" if line else "#" for line in lines), end="\n" if lines else "")
    if missing:
        raise ValueError(f"{config}: would not start: {'; '.join(missing)}")
    return 0
