"""What travels between an engine's process and its owner: frames of JSON, followed by the bytes of tensors.

Frame: u64 length of the head, the head (JSON, its `blobs` are lengths in bytes), the blobs.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vtengine.engine.base import Completion, ImageInput, Request, SamplingParams

Head = dict[str, Any]
Held = TypeVar("Held")

_LENGTH = struct.Struct("<Q")
IMAGE_BYTES = 256 << 20
"""Of the pixels that a process keeps, so that turns and siblings need not send them again."""


def write_frame(line: socket.socket, head: Head, tensors: Sequence[Tensor] = ()) -> None:
    """Blocks until all is handed to the system. Raises OSError where the other side is gone."""
    blobs = [_bytes_of(tensor) for tensor in tensors]
    text = json.dumps(head | {"blobs": [len(blob) for blob in blobs]}).encode()
    line.sendall(_LENGTH.pack(len(text)) + text)
    for blob in blobs:
        line.sendall(blob)


def read_frame(line: socket.socket) -> tuple[Head, list[bytearray]] | None:
    """Blocks; None once the other side is gone."""
    try:
        (length,) = _LENGTH.unpack(_read(line, _LENGTH.size))
        head: Head = json.loads(_read(line, length))
        return head, [_read(line, size) for size in head.pop("blobs")]
    except (EOFError, OSError):
        return None


def _read(line: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = line.recv_into(view[done:])
        if not count:
            raise EOFError
        done += count
    return data


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer, though not typed as one


def describe(tensor: Tensor) -> Head:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def tensor_of(head: Head, blob: bytearray) -> Tensor:
    dtype: torch.dtype = getattr(torch, head["dtype"])
    flat = torch.frombuffer(blob, dtype=dtype) if blob else torch.empty(0, dtype=dtype)
    return flat.reshape(head["shape"])


class Mirrored(Generic[Held]):
    """A bounded cache that two processes keep alike: both are told the same keys in the same order."""

    def __init__(self, max_bytes: int = IMAGE_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._held: OrderedDict[str, tuple[Held, int]] = OrderedDict()

    def get(self, key: str) -> Held | None:
        """Counts as a use."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: str, held: Held, num_bytes: int) -> None:
        """The key must not be there. One that is too large for the cache is not kept, by either side."""
        self._held[key] = held, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, (_, freed) = self._held.popitem(last=False)
            self._num_bytes -= freed


def pack_request(request: Request, known: Mirrored[bool]) -> tuple[Head, list[Tensor]]:
    """The request, and the pixels that the other side does not hold yet."""
    sampling = asdict(request.sampling) | {"logit_bias": list(request.sampling.logit_bias.items())}
    images, pixels = [], []
    for image in request.images:
        tensor = image.pixel_values
        head = {"content_hash": image.content_hash, "grid_thw": image.grid_thw, "patch": image.patch}
        head |= describe(tensor)
        head["is_sent"] = known.get(_key(head)) is None
        if head["is_sent"]:
            pixels.append(tensor)
            known.put(_key(head), True, tensor.nbytes)
        images.append(head)
    return {
        "request_id": request.request_id,
        "token_ids": request.token_ids,
        "images": images,
        "sampling": sampling,
        "began_s": request.began_s,
    }, pixels


def unpack_request(head: Head, blobs: Sequence[bytearray], known: Mirrored[Tensor]) -> Request:
    images, left = [], iter(blobs)
    for of in head["images"]:
        pixels = None if of["is_sent"] else known.get(_key(of))
        if pixels is None:
            pixels = tensor_of(of, next(left))
            known.put(_key(of), pixels, pixels.nbytes)
        images.append(ImageInput(of["content_hash"], tuple(of["grid_thw"]), pixels, of["patch"]))
    sampling = head["sampling"]
    lists = {name: tuple(sampling[name]) for name in ("stop", "stop_token_ids")}
    params = SamplingParams(**sampling | lists | {"logit_bias": dict(sampling["logit_bias"])})
    return Request(head["request_id"], tuple(head["token_ids"]), tuple(images), params, head["began_s"])


def _key(head: Head) -> str:
    return json.dumps([head["content_hash"], head["grid_thw"], head["patch"], head["dtype"], head["shape"]])


def pack_completion(completion: Completion, waited_s: float) -> Head:
    """waited_s: from the request's sending to its arrival, which belongs to its latency."""
    head = asdict(completion)
    return head | {name: head[name] + waited_s for name in ("ttft_s", "latency_s")}


def unpack_completion(head: Head) -> Completion:
    lists = {name: tuple(head[name]) for name in ("token_ids", "logprobs", "images_encoded")}
    return Completion(**head | lists)
