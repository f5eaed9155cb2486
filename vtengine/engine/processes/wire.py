"""What travels between an engine's process and its owner: frames of JSON, followed by the bytes of tensors.

Frame: u64 length of the head, the head (JSON, its `blobs` are lengths in bytes), the blobs.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
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
    blobs = [_bytes_of(tensor) for tensor in on_cpu(tensors)]
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
        count = line.recv_into(view[done:], 0, socket.MSG_WAITALL)  # in one call: after each, Python is waited for
        if not count:
            raise EOFError
        done += count
    return data


def on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous, as they travel; what is so already is not copied."""
    return [tensor.detach().cpu().contiguous() for tensor in tensors]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.flatten()
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
        if num_bytes > self._max_bytes:
            return
        self._held[key] = held, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, (_, freed) = self._held.popitem(last=False)
            self._num_bytes -= freed


def pack_request(request: Request, known: Mirrored[bool]) -> tuple[Head, list[Tensor]]:
    """The request, and the pixels that the other side does not hold yet.

    Raises TypeError for what JSON cannot say, before `known` takes note of pixels that would never be sent.
    """
    sampling = vars(request.sampling) | {"logit_bias": list(request.sampling.logit_bias.items())}
    images = [
        {"content_hash": image.content_hash, "grid_thw": image.grid_thw, "patch": image.patch}
        | describe(image.pixel_values)
        for image in request.images
    ]
    names = ("request_id", "token_ids", "began_s")
    text = json.dumps({name: getattr(request, name) for name in names} | {"images": images, "sampling": sampling})
    is_sent, pixels = [], []
    for head, image in zip(images, request.images, strict=True):
        key = _key(head)
        is_sent.append(known.get(key) is None)
        if is_sent[-1]:
            pixels.append(image.pixel_values)
            known.put(key, True, image.pixel_values.nbytes)
    return {"request": text, "is_sent": is_sent}, pixels


def unpack_request(packed: Head, blobs: Sequence[bytearray], known: Mirrored[Tensor]) -> Request:
    head, left = json.loads(packed["request"]), iter(blobs)
    images = []
    for of, is_sent in zip(head["images"], packed["is_sent"], strict=True):
        pixels = None if is_sent else known.get(_key(of))
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
    head = vars(completion)
    return head | {name: head[name] + waited_s for name in ("ttft_s", "latency_s")}


def unpack_completion(head: Head) -> Completion:
    lists = {name: tuple(head[name]) for name in ("token_ids", "logprobs", "images_encoded")}
    return Completion(**head | lists)
