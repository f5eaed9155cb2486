"""Signals to a training run: the first ones ask, a later Ctrl-C interrupts."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from vtengine_training import stopping
from vtengine_training.stopping import stop_at_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop(number, capfd) -> None:
    run, before = SimpleNamespace(stop_requested=False), signal.getsignal(number)
    with stop_at_signal(run):
        assert not run.stop_requested
        signal.raise_signal(number)
        assert run.stop_requested
        signal.raise_signal(number)  # at once: a launcher passes on what its processes have got already
    assert signal.getsignal(number) is before
    assert ("Ctrl-C again" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_later_ctrl_c_interrupts(monkeypatch) -> None:
    monkeypatch.setattr(stopping, "SAME_S", -1.0)
    run, before = SimpleNamespace(stop_requested=False), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_at_signal(run):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert run.stop_requested and signal.getsignal(signal.SIGINT) is before
