"""Questions in columns, answers in columns: for Python programs, and as a stage of Ray Data's `map_batches`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from vtengine.cli.arguments import engine_options
from vtengine.cli.session import default_concurrency, open_session
from vtengine.protocol.messages import ErrorInfo
from vtengine.rollout.group import Setting, in_order, run_sample
from vtengine.rollout.question import Question
from vtengine.rollout.records import Row, episode_row, rejected_row
from vtengine.vision.decode import rgb_pixels
from vtengine.vision.errors import ImageError

T = TypeVar("T")
Columns = dict[str, Any]
ANSWERS = ("answer", "status", "error", "upscaled", "visual_tokens", "visual_tokens_full", "row")


class AnswerBatches:
    """Loads the model or connects to the servers once; each call answers a batch.

        dataset.map_batches(AnswerBatches, fn_constructor_args=("glance",), batch_size=64, concurrency=1)

    model, backend and options are those of `vtengine ask`: AnswerBatches("glance", max_turns=1, temperature=1.0); what
    may be given several times takes a list.
    concurrency: episodes at a time, by default as in `vtengine generate`. image_root: relative paths start there, and
    none may leave it.
    Columns in: `image` (a path, a data URL, the bytes of a file, a PIL image, {"bytes", "path"} as datasets have it, or
    None for a question about text alone), `question`, and `id` where there is one.
    Columns out: those, and ANSWERS (`row`: the record of `vtengine generate`, as JSON); a column `answer` that came in
    is called `expected`. A bad row does not end a batch.
    Calls may come from several threads, and from where an event loop runs already, as in a notebook; not from a process
    that was forked later.
    ValueError: an option that there is not, or a value outside its range; a model that cannot be used is a CliError.
    """

    def __init__(
        self,
        model: str = "glance",
        backend: str = "embedded",
        image_root: str = ".",
        concurrency: int | None = None,
        **options: Any,
    ) -> None:
        flags = ["--model", str(model), "--backend", backend]
        for name, value in options.items():
            switch = f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list | tuple) else [value]:
                flags += [switch] if one is True else [] if one is False or one is None else [switch, str(one)]
        self.arguments = engine_options(flags)
        self.image_root = Path(image_root)
        if not self.image_root.is_dir():
            raise ValueError(f"image_root = {str(image_root)!r}: is not a folder")
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency = {concurrency}: must be >= 1")
        self.concurrency = concurrency or default_concurrency(self.arguments)
        self._stack, self._is_closed = AsyncExitStack(), False
        self._loop = _LoopThread()
        self._setting = self._loop.begin(self._open())

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """Raises ValueError where `image` or `question` is no column, or columns differ in length."""
        missing = [name for name in ("image", "question") if name not in batch]
        if missing:
            raise ValueError(f"batch: has no column {missing[0]}; it has {', '.join(sorted(batch))}")
        lengths = {name: len(batch[name]) for name in ("image", "question", "id") if name in batch}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"batch: columns differ in length: {lengths}")
        if self._is_closed:
            raise RuntimeError("AnswerBatches is closed; make another one")
        rows = self._loop.run(self._answer(batch))
        found: Columns = {name: [] for name in ANSWERS}
        for row in rows:
            error = row["error"] and f"{row['error']['code']}: {row['error']['message']}"
            for name in ANSWERS:
                found[name].append(error if name == "error" else json.dumps(row) if name == "row" else row[name])
        return {"expected" if name == "answer" else name: column for name, column in batch.items()} | found

    def close(self) -> None:
        """Stops the engine; a second time does nothing. Ray ends the process instead."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.run(self._stack.aclose())
            self._loop.end()

    def __enter__(self) -> AnswerBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _open(self) -> Setting:
        return await self._stack.enter_async_context(open_session(self.arguments, self.concurrency))

    async def _answer(self, batch: Mapping[str, Any]) -> list[Row]:
        ids = batch.get("id", range(len(batch["question"])))
        rows = enumerate(zip(ids, batch["image"], batch["question"], strict=True))
        jobs = (partial(self._row, _row_id(row_id, index), image, text) for index, (row_id, image, text) in rows)
        return [row async for row in in_order(jobs, self.concurrency)]

    async def _row(self, row_id: str | int, image: Any, text: Any) -> Row:
        try:
            source = None if image is None else _source(image)
        except ImageError as fault:
            return rejected_row(row_id, 0, ErrorInfo(fault.code, str(fault)))
        except Exception as fault:  # Pillow's plugins raise anything at all for a bad file
            return rejected_row(row_id, 0, ErrorInfo("image_corrupt", f"the image cannot be read: {fault}"))
        if not isinstance(text, str) or (image is not None and not isinstance(source, str)):
            kinds = f"image is a {type(image).__name__}, question a {type(text).__name__}"
            error = ErrorInfo("input_wrong_type", f"{kinds}; give text, bytes or a PIL image")
            return rejected_row(row_id, 0, error)
        sample = await run_sample(self._setting, Question(row_id, source, text, self.image_root), 0)
        return episode_row(sample.episode, 0)


class _LoopThread:
    """An event loop that has a thread of its own once `begin` is done."""

    first_process: int | None = None
    """Where the first one began, be it a parent of this process."""

    def __init__(self) -> None:
        cls = _LoopThread
        cls.first_process = cls.first_process or os.getpid()
        if cls.first_process != os.getpid() and torch.get_num_threads() > 1:
            raise RuntimeError(
                "an AnswerBatches ran in the process that this one was forked from, and torch's threads do not outlive "
                "a fork: start processes by multiprocessing's spawn, or make the first one after the fork"
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vtengine-batches", daemon=True)
        self._process = os.getpid()

    def begin(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs in the caller's thread where no loop does: an engine may handle signals, and
        that is for the main thread."""
        try:
            if _in_a_loop():
                self._thread.start()
                return self.run(work)
            result = self._loop.run_until_complete(work)
            self._thread.start()
            return result
        except BaseException:
            self.end()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which ends when waiting for it is interrupted. RuntimeError in a forked process, where
        the thread is not."""
        if os.getpid() != self._process:
            work.close()
            raise RuntimeError("AnswerBatches was made before this process was forked; make one in each process")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def end(self) -> None:
        """What still runs is cancelled, and waited for."""
        if self._thread.is_alive():
            self.run(self._finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        else:
            self._loop.run_until_complete(self._finish())
        self._loop.close()

    async def _finish(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            if not task.cancelling():  # a second time would end its clean-up
                task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_default_executor()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _source(image: Any) -> Any:
    """As a question takes it, where it is an image in one of the known ways."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        Image.fromarray(rgb_pixels(image)).save(file, "PNG", compress_level=1)
        image = file.getvalue()
    if isinstance(image, bytes):
        image = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
    return image


def _row_id(value: Any, index: int) -> str | int:
    """A table's id; the row's number in the batch where there is none (None, or NaN in a column of numbers)."""
    try:
        return value if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        return index
