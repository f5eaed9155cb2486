"""The processes of a run and what they tell each other. A run of one process has no process group at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vtengine_training.errors import first_line
from vtengine_training.trainer.watch import Watch, open_watch

T = TypeVar("T")


class RanksLost(RuntimeError):
    """Another rank has ended, or did not come to a meeting in time."""


class Line:
    """The group that carries what ranks tell each other, and nothing else, so that nothing else keeps it alive.

    A gloo group has threads that let go of tensors a moment after a call returns, for which they need the interpreter.
    Should it be gone by then, the process aborts. Only the end of the group waits for its threads.
    """

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s))
        self._branches: list[Line] = []

    def branch(self) -> Line:
        """One more, which ends with this one. A meeting."""
        self._branches.append(Line(self.wait_s))
        return self._branches[-1]

    def end(self) -> None:
        for branch in self._branches:
            branch.end()
        dist.destroy_process_group(self.group)
        self.group = None


@dataclass(frozen=True)
class Ranks:
    """Which of `size` processes this is. Every method but the properties is a meeting: all ranks call it, in order.

    What travels is plain JSON data: nothing is unpickled.
    """

    rank: int = 0
    size: int = 1
    line: Line | None = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def join(device: torch.device, wait_s: float = 7200) -> Ranks:
        """Meets the processes that torchrun started, by its environment; alone without one.

        With a GPU each process takes the one of its local rank. wait_s: longest time that a rank waits for the others.
        Raises ValueError where there are too few GPUs, and where the processes do not find each other.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Ranks()
        if device.type == "cuda":
            torch.cuda.set_device(_own_gpu())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            # Without device_id: a group bound to a device is what torch makes all later ones of NCCL from, and that of
            # trainer and servers has other members.
            dist.init_process_group(backend, timeout=timedelta(seconds=wait_s))
            ranks = Ranks(dist.get_rank(), size, Line(wait_s))
        except RuntimeError as error:
            raise ValueError(
                f"the {size} processes did not meet at MASTER_ADDR = {os.environ.get('MASTER_ADDR')}, port "
                f"{os.environ.get('MASTER_PORT')}: {first_line(error)}. If they run on several nodes, where a node's "
                "own name may stand for 127.0.0.1, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each to its "
                "interface to the others, such as eth0"
            ) from error
        if device.type == "cuda":
            _check_gpus(ranks.gather(str(torch.cuda.get_device_properties(None).uuid)))
        return replace(ranks, watch=open_watch(ranks))

    def branch(self) -> Ranks:
        """The same processes with a line of its own, for meetings of another thread, at the same time as those here."""
        return self if self.line is None else replace(self, line=self.line.branch())

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes records, metrics and whatever exists once."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def owns(self, number: int) -> bool:
        """Whether the number-th of many equal tasks is this rank's."""
        return number % self.size == self.rank

    def mesh(self, device: torch.device, row: int | None = None) -> DeviceMesh:
        """All ranks in one row; or in rows of `row` neighbours. Raises ValueError where that does not come out even."""
        if row is None or row == self.size:
            return init_device_mesh(device.type, (self.size,))
        if row > self.size or self.size % row:
            raise ValueError(f"update.shard_ranks = {row}: must divide the number of ranks ({self.size})")
        return init_device_mesh(device.type, (self.size // row, row), mesh_dim_names=("copies", "pieces"))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in their order, on every rank."""
        if self.is_alone:
            return [value]
        data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        assert self.line is not None
        with _others_may_be_lost():
            dist.all_gather(lengths, torch.tensor([len(data)]), self.line.group)
            longest = int(max(lengths))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = data
            received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(received, padded, self.line.group)
        return [_read(one, int(length)) for one, length in zip(received, lengths, strict=True)]

    def exchange(self, parcels: Sequence[bytes]) -> list[bytes]:
        """parcels[k] goes to rank k; what came from each rank, in their order."""
        sizes = [len(parcel) for parcel in parcels]
        coming = [row[self.rank] for row in self.gather(sizes)]
        sent = torch.from_numpy(np.frombuffer(bytearray().join(parcels), dtype=np.uint8))
        received = torch.empty(sum(coming), dtype=torch.uint8)
        assert self.line is not None
        with _others_may_be_lost():
            dist.all_to_all_single(received, sent, coming, sizes, group=self.line.group)
        return [part.numpy().tobytes() for part in received.split(coming)]

    def first(self, value: Any = None) -> Any:
        """The first rank's `value`."""
        return self.gather(value if self.is_first else None)[0]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name; a name may be missing on some ranks."""
        found: dict[str, float] = {}
        for part in self.gather(dict(values)):
            for name, value in part.items():
                found[name] = found.get(name, 0) + value
        return found

    def sum(self, value: float) -> float:
        """The same number on every rank; NaN where one is."""
        return float(sum(self.gather(value)))

    def any(self, flag: bool) -> bool:
        """Whether it is true somewhere."""
        return any(self.gather(bool(flag)))

    def together(self, make: Callable[[], T]) -> T:
        """make() on every rank. A ValueError or OSError of one is raised by all: those that could go on do not wait."""
        if self.is_alone:
            return make()
        own: ValueError | OSError | None = None
        try:
            made = make()
        except (ValueError, OSError) as error:
            own = error
        failures = self.gather(None if own is None else str(own))
        if own is not None:
            raise own
        if failed := [rank for rank, words in enumerate(failures) if words is not None]:
            raise ValueError(f"rank {failed[0]}: {failures[failed[0]]}")
        return made

    def from_first(self, make: Callable[[], T]) -> T:
        """make() of the first rank, on every rank: JSON data. A ValueError or OSError of it is raised by all."""
        if self.is_alone:
            return make()
        made, failure = None, ""
        if self.is_first:
            try:
                made = make()
            except (ValueError, OSError) as error:
                failure = str(error)
        made, failure = self.first([made, failure])
        if failure:
            raise ValueError(failure)
        return cast(T, made)

    def one_before_others(self, make: Callable[[], T]) -> T:
        """make() on every rank, on the first one first: what it writes, the others find. A ValueError or OSError of the
        first one is raised by all."""
        if self.is_alone:
            return make()
        failure = ""
        if self.is_first:
            try:
                return make()
            except (ValueError, OSError) as error:
                failure = str(error)
                raise
            finally:
                self.first(failure)
        if failure := self.first():
            raise ValueError(failure)
        return make()

    def leave(self, in_order: bool = True) -> None:
        """The end of the meetings. in_order: for all ranks alike; otherwise the others are told to end, and nothing is
        waited for: NCCL would wait for collectives that the others never join. The groups are then left as they are,
        and their threads may abort this process if it ends other than by `os._exit` (`vtengine_training.cli.program`).
        """
        if self.is_alone or not dist.is_initialized():
            return
        if not in_order:
            if self.watch is not None:
                self.watch.give_up()
            return
        if self.watch is not None:
            self.watch.leave()
        assert self.line is not None
        self.line.end()
        dist.destroy_process_group()


@contextmanager
def _others_may_be_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RanksLost(
            f"another rank ended, or did not answer in time (rank_timeout_s); see its own words. {first_line(error)}"
        ) from error


def _own_gpu() -> int:
    """The one of the local rank; or the only one: some launchers show each process its own and no other."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count > 1:
        raise ValueError(f"local rank {local}: there are {count} GPUs; use a smaller --nproc-per-node")
    return local if count > 1 else 0


def _check_gpus(of_ranks: Sequence[str]) -> None:
    """Raises ValueError where two ranks have the same GPU, by its UUID."""
    for rank, gpu in enumerate(of_ranks):
        if (other := of_ranks.index(gpu)) != rank:
            raise ValueError(f"ranks {other} and {rank} have the same GPU, {gpu}; use a smaller --nproc-per-node")


def _read(data: Tensor, length: int) -> Any:
    return json.loads(data[:length].numpy().tobytes())
