"""What becomes of sampled tokens: appended to their sequences and told to callers, until an answer is whole."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from vtengine.engine.base import BackendFailed, Completion

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vtengine.engine.base import Finish
    from vtengine.engine.embedded.encoder import Encoder
    from vtengine.engine.embedded.scheduler import Row, Scheduler
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.engine.embedded.stop import StopFinder
    from vtengine.engine.pace import Pace


class Answers:
    """Used in the worker thread; `counters` may be read anywhere."""

    def __init__(self, scheduler: Scheduler, encoder: Encoder, stops: StopFinder, pace: Pace) -> None:
        self._scheduler, self._encoder, self._stops, self._pace = scheduler, encoder, stops, pace
        self.counters = dict.fromkeys(("steps", "batch_tokens", "prefill_tokens", "generated_tokens", "requests"), 0)

    def commit(self, rows: list[Row], token_ids: list[int], logprobs: list[float]) -> None:
        """What a pass over these rows has sampled; tokens of sequences that ended meanwhile are nobody's."""
        now = time.perf_counter()
        sampled = zip((row.sequence for row in rows if row.samples), token_ids, logprobs, strict=True)
        wanted = [one for one in sampled if one[0].finish is None]
        self._pace.step(now, len(wanted))
        self.counters["steps"] += 1
        self.counters["generated_tokens"] += len(wanted)
        for row in rows:
            self.counters["batch_tokens"] += row.count
            if row.start < row.sequence.num_prompt:
                self.counters["prefill_tokens"] += min(row.count, row.sequence.num_prompt - row.start)
        for sequence, _, logprob in wanted:
            if math.isnan(logprob):  # the id is then arbitrary, and what was cached may hold NaN too
                raise FloatingPointError(
                    f"request {sequence.request.request_id}: the model's scores are not finite: its weights overflow "
                    f"in {self._encoder.model.dtype}; load it in float32, or take a checkpoint from before the "
                    "training diverged"
                )
        for sequence, token_id, logprob in wanted:
            if not sequence.logprobs:
                sequence.first_token_s = now
            sequence.append(token_id, logprob)
            if sequence.caller is not None:
                sequence.caller.sampled(token_id)
            finish = self._finished(sequence, token_id)
            if finish is not None:
                self._close(sequence, finish)

    def cancel(self, sequence: Sequence) -> None:
        if sequence.finish is None:
            self._close(sequence, "cancelled")

    def fail_all(self, error: Exception | None) -> None:
        """A pass failed (None: the engine was closed): every request fails, and no page is to be trusted any more."""
        message = "the engine was closed" if error is None else f"a step failed: {error!r}"
        self.fail(self._scheduler.drop_all(), message, error)

    def fail(self, sequences: Iterable[Sequence], message: str, cause: Exception | None) -> None:
        """Sequences that the scheduler has no more."""
        for sequence in sequences:
            sequence.finish = "error"
            sequence.features.clear()
            if sequence.caller is not None:
                failure = BackendFailed(message)
                failure.__cause__ = cause
                sequence.caller.failed(failure)

    def _finished(self, sequence: Sequence, token_id: int) -> Finish | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids:
            return "stop"
        if sampling.stop and self._stops.found(sequence.tokens[sequence.num_prompt :], sampling.stop):
            return "stop"
        return "length" if len(sequence.logprobs) >= sampling.max_new_tokens else None

    def _close(self, sequence: Sequence, finish: Finish) -> None:
        self._scheduler.finish(sequence, finish)
        self.counters["requests"] += 1
        now = time.perf_counter()
        completion = Completion(
            request_id=sequence.request.request_id,
            token_ids=tuple(sequence.tokens[sequence.num_prompt :]),
            logprobs=tuple(sequence.logprobs),
            finish=finish,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=max(sequence.cached_tokens, 0),
            images_encoded=tuple(sequence.encoded),
            weight_version=self._encoder.weight_version,
            ttft_s=(sequence.first_token_s or now) - sequence.submitted_s,
            latency_s=now - sequence.submitted_s,
        )
        if sequence.caller is not None:
            sequence.caller.finished(completion)
