"""Frames between processes: everything arrives as it was sent, and pixels are sent once."""

from __future__ import annotations

import math
import socket
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.tiny import image, prompt, request
from vtengine.engine.base import Completion, ImageInput, Request, SamplingParams
from vtengine.engine.processes.wire import (
    Mirrored,
    describe,
    pack_completion,
    pack_request,
    read_frame,
    tensor_of,
    unpack_completion,
    unpack_request,
    write_frame,
)


def sent(head, tensors=()):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=write_frame, args=(ours, head, tensors))
        writer.start()
        found = read_frame(theirs)
        writer.join()
        return found


def travelled(ask, ours, theirs):
    head, pixels = pack_request(ask, ours)
    arrived, blobs = sent({"request": head}, pixels)
    return unpack_request(arrived["request"], blobs, theirs), len(pixels)


def test_a_request_arrives_as_it_was_sent():
    sampling = SamplingParams(
        7, 0.5, 0.25, 3, 0.125, 2**62, ("</tool_call>", "ß"), (5, 6), {3: -math.inf, 250: 0.1}
    )  # fmt: skip
    pictures = (image(1), ImageInput("b", (1, 2, 2), torch.randn(4, 588).bfloat16(), 16))
    ask = Request("a/0", (1, 2, 2**31), pictures, sampling, 1234.5678901234567)
    found, _ = travelled(ask, Mirrored(), Mirrored())
    assert found == ask
    for mine, theirs in zip(ask.images, found.images, strict=True):
        assert mine.pixel_values.dtype == theirs.pixel_values.dtype
        assert torch.equal(mine.pixel_values, theirs.pixel_values)


def test_a_completion_arrives_as_it_was_sent():
    completion = Completion("a", (1, 2), (-0.1, -math.inf), "stop", 9, 3, (True, False), 4, 0.25, 0.5)
    head, _ = sent({"completion": pack_completion(completion, 0.0)})
    assert unpack_completion(head["completion"]) == completion
    late = unpack_completion(pack_completion(completion, 0.5))
    assert (late.ttft_s, late.latency_s) == (0.75, 1.0)


@pytest.mark.parametrize("tensor", [torch.empty(0, 588), torch.tensor(3.0), torch.randn(6, 4).T, torch.arange(5)])
def test_a_tensor_of_any_shape_and_layout(tensor):
    head, (blob,) = sent({"of": describe(tensor)}, [tensor])
    assert torch.equal(tensor_of(head["of"], blob), tensor)


def test_a_line_that_ends_inside_a_frame_is_no_frame():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"\x09\0\0\0\0\0\0\0{")
        assert read_frame(theirs) is None


def test_the_second_turn_sends_the_new_image_alone():
    low, high = image(1), image(2, h=6, w=8)
    ours, theirs = Mirrored(), Mirrored()
    first, count = travelled(request("a", prompt(1, 9, [low]), [low]), ours, theirs)
    second, more = travelled(request("b", prompt(1, 9, [low, high]), [low, high]), ours, theirs)
    assert (count, more) == (1, 1)
    assert torch.equal(second.images[0].pixel_values, low.pixel_values)
    assert torch.equal(second.images[1].pixel_values, high.pixel_values)
    assert first.images[0] == low


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([2, 4, 12])), max_size=3), max_size=12))
def test_both_sides_forget_the_same_images(asks):
    """Whatever is asked in whatever order, with room for few: pixels arrive, sent or held."""
    ours, theirs = Mirrored(30_000), Mirrored(30_000)
    for names in asks:
        pictures = [image(seed, h=h, w=2) for seed, h in names]
        head, pixels = pack_request(request("a", (1,), pictures), ours)
        blobs = [bytearray(tensor.numpy().tobytes()) for tensor in pixels]
        found = unpack_request(head, blobs, theirs)
        assert all(torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(found.images, pictures, strict=True))
