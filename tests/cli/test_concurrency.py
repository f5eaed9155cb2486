"""How many episodes go at a time where nobody says."""

from __future__ import annotations

import pytest
import torch

from vtengine.cli.arguments import build_parser, engine_options
from vtengine.cli.serve import _limits
from vtengine.cli.session import default_concurrency

TWO_SERVERS = "http://a:30000,http://b:30000"


@pytest.mark.parametrize(
    ("flags", "on_cpu", "on_gpu"),
    [
        ([], 32, 128),
        (["--device", "cpu"], 32, 32),
        (["--data-parallel", "2"], 32, 256),
        (["--backend", "sglang"], 128, 128),
        (["--backend", TWO_SERVERS], 256, 256),
        (["--backend", "scripted:x.json"], 32, 32),
    ],
)
def test_gpus_and_servers_get_more(flags: list[str], on_cpu: int, on_gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        assert default_concurrency(engine_options(flags)) == expected


def test_a_servers_limits_follow_and_give_way() -> None:
    serve = build_parser().parse_args
    limits = _limits(serve(["serve", "--device", "cpu"]))
    assert (limits.max_running, limits.max_waiting, limits.max_text_events_per_s) == (32, 128, 200)
    limits = _limits(serve(["serve", "--backend", TWO_SERVERS, "--set", "max_waiting=7"]))
    assert (limits.max_running, limits.max_waiting, limits.max_text_events_per_s) == (256, 7, 2000)
