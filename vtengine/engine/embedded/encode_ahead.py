"""The vision tower for sequences that wait, in a thread of its own beside the passes of those that run.

On a CPU neither the tower nor a pass of the language model keeps every core busy all the time: two of them beside each
other, on half of the threads each, end sooner than one after the other on all. On a GPU decoding waits for memory and
the tower computes; on a stream each (see Encoder), nobody's next token waits for a stranger's picture.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtengine.engine.embedded.encoder import Claims, Encoder, images_of

if TYPE_CHECKING:
    from vtengine.engine.embedded.scheduler import Scheduler
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.engine.embedded.vision_cache import FeatureKey

BATCHES = 2
"""Of images, begun at a time: one that the tower works on, one to follow it without waiting for the end of a step."""


class EncodeAhead:
    """Holds sequences in the queue until their images are encoded.

    All but the tower's own work happens in the engine's thread. Nothing is begun before the first in the queue is one
    that is held, so that of all that wait only those of the last batches have their features.
    """

    def __init__(
        self, encoder: Encoder, scheduler: Scheduler, num_threads: int | None = None, wanted: bool | None = None
    ) -> None:
        """num_threads: torch threads of the engine's thread, which it shares while the tower runs."""
        self._encoder = encoder
        self._scheduler = scheduler
        self._threads = num_threads or torch.get_num_threads()
        self._tower_threads = max(1, self._threads // 2)
        device = encoder.model.device
        self._is_on_cpu = device.type == "cpu"
        self._is_on = (self._threads > 1 or not self._is_on_cpu) if wanted is None else wanted
        on_cpu, on_gpu = partial(torch.set_num_threads, self._tower_threads), partial(torch.cuda.set_device, device)
        self._tower = ThreadPoolExecutor(1, "vtengine-tower", on_cpu if self._is_on_cpu else on_gpu)
        self._begun: deque[tuple[Claims, Future[list[Tensor]]]] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._begun)

    def hold(self, sequence: Sequence) -> None:
        """Decides whether the sequence is to wait in the queue for its features."""
        sequence.held = self._is_on and bool(self._missing(sequence))

    def begin(self) -> None:
        """Starts on the images of the next sequences, as many as make one pass of the tower."""
        waiting = self._scheduler.waiting
        if len(self._begun) == BATCHES or not waiting or not waiting[0].held:
            return
        known = {key: claimants for claims, _ in self._begun for key, claimants in claims.items()}
        begun = {sequence for claimants in known.values() for sequence, _ in claimants}
        new: Claims = {}
        patches = 0
        for sequence in waiting:
            if not sequence.held or sequence in begun:  # all that it misses is on its way
                continue
            missing = self._missing(sequence)
            images = {key: sequence.spans[index].image for key, index in missing if key not in known}
            patches += sum(len(image.pixel_values) for image in images.values())
            if new and patches > self._encoder.max_patches:
                break
            for key in images:
                known[key] = new[key] = []
            for key, index in missing:
                if (sequence, index) not in known[key]:
                    known[key].append((sequence, index))
            sequence.held = bool(missing)
        if new:
            self._begun.append((new, self._tower.submit(self._encoder.run_tower, images_of(new))))
            self._share_threads(self._threads - self._tower_threads)

    def collect(self, wait: bool) -> None:
        """Hands out what the tower has done. wait: for its next batch, if any was begun.

        Of images that the GPU has no memory for, the pass that shows them finds out whose they are. Raises what else
        failed there.
        """
        while self._begun and (wait or self._begun[0][1].done()):
            wait = False
            claims, features = self._pop()
            fits = not isinstance(features.exception(), torch.OutOfMemoryError)
            if fits:
                self._encoder.give(claims, features.result())
            for claimants in claims.values():
                for sequence, _ in claimants:
                    sequence.held = fits and bool(self._missing(sequence))

    def forget(self) -> None:
        """Drops what was begun, once the tower is done with it."""
        while self._begun:
            self._pop()[1].exception()

    def close(self) -> None:
        self._tower.shutdown()

    def _pop(self) -> tuple[Claims, Future[list[Tensor]]]:
        """The oldest batch; after the last one all threads are the engine's again."""
        oldest = self._begun.popleft()
        if not self._begun:
            self._share_threads(self._threads)
        return oldest

    def _share_threads(self, count: int) -> None:
        if self._is_on_cpu:
            torch.set_num_threads(max(1, count))

    def _missing(self, sequence: Sequence) -> list[tuple[FeatureKey, int]]:
        """Images of a waiting sequence for which it needs features, by key and index."""
        if not sequence.spans:
            return []
        known = self._scheduler.known(sequence).num_tokens
        wanted = [i for i, span in enumerate(sequence.spans) if span.end > known and i not in sequence.features]
        keys = [(self._encoder.key(sequence, index), index) for index in wanted]
        return [(key, index) for key, index in keys if key not in self._encoder.cache]
