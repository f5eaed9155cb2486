"""What every test gets: one thread, a seed, no network, and the folder of real data when there is one."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis  # noqa: E402  (after the thread counts are set)
import pytest  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
# Without an __init__.py, a folder loses against an installed package of its name (pyarrow 17 brings a `benchmarks`).
for _name in ("benchmarks", "tests"):
    _folder = sys.modules[_name] = ModuleType(_name)
    _folder.__path__ = [str(REPO / _name)]
hypothesis.settings.register_profile("shared cores", deadline=None)  # other work may stop an example for long
hypothesis.settings.load_profile("shared cores")
SEED = 20250713
LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
LONGEST_FIRST = (
    "tests/training/trainer/test_ranks.py",
    "tests/kernels/test_grpo_loss_triton.py",
    "tests/training/trainer/test_shared_servers.py",
    "tests/training/trainer/test_sharding.py",
    "tests/kernels/test_prefix_attention_triton.py",
    "tests/training/test_sft.py",
    "tests/repo/test_packaging.py",
    "tests/training/trainer/test_resume.py",
    "tests/training/trainer/test_command.py",
    "tests/training/trainer/test_update.py",
    "tests/training/trainer/test_learning.py",
    "tests/cli/test_demo.py",
)
"""Files that take ten seconds and more: none of them is left when the other processes of `make test` have no more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: number for number, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


class NetworkUsed(RuntimeError):
    """A test tried to reach another machine."""


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections leave this machine in no test; local sockets stay allowed."""
    real = socket.socket.connect, socket.socket.connect_ex

    def guarded(connect):
        def wrapper(self: socket.socket, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL):
                raise NetworkUsed(f"a test tried to connect to {address}; tests use local servers only")
            return connect(self, address)

        return wrapper

    socket.socket.connect, socket.socket.connect_ex = (guarded(one) for one in real)
    yield
    socket.socket.connect, socket.socket.connect_ex = real


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds python, numpy and torch; the last two only where a test module has imported them."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules and hasattr(sys.modules["torch"], "manual_seed"):
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photographs, documents and tokenizers that are not shipped; the test is skipped without them."""
    folder = Path(os.environ.get("VTENGINE_TEST_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real test data at {folder} (set VTENGINE_TEST_DATA to its folder)")
    return folder
