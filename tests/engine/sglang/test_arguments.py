"""Arguments of SGLang's engine by name, up to the call that makes one. A real one: test_real.py."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from vtengine.engine.sglang import inprocess
from vtengine.engine.sglang.arguments import checked
from vtengine.engine.sglang.inprocess import EngineTransport

KNOWN = ("model_path", "tp_size", "mem_fraction_static", "page_size", "attention_backend")


def test_names_may_be_written_as_on_the_command_line():
    assert checked({"mem-fraction-static": 0.4, "tp_size": 2}, KNOWN, "1") == {"mem_fraction_static": 0.4, "tp_size": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mem_fraction_statc": 0.5}, "mem_fraction_statc: SGLang 1 has none.*did you mean mem_fraction_static"),
        ({"xyz": 0}, "xyz: SGLang 1 has none.*launch_server --help"),
        ({"model_path": "/m"}, "model_path: leave it out, it follows from the model"),
        ({"base-gpu-id": 1}, "base-gpu-id: leave it out.*cuda:1"),
        ({"tp-size": 1, "tp_size": 2}, "tp_size: is given twice"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=f"engine argument {words}"):
        checked(arguments, KNOWN, "1")


@pytest.fixture
def engine(monkeypatch):
    """Stands in for SGLang: what its engine is made with."""

    class ServerArgs:
        def __init__(self, model_path, device, dtype, tp_size=1, mem_fraction_static=None, page_size=1, **ours):
            if mem_fraction_static is not None and not 0 < mem_fraction_static < 1:
                raise AssertionError("a share, please")

    class Engine:
        server_args_class = ServerArgs
        made = None

        def __init__(self, **settings):
            ServerArgs(**settings)
            Engine.made = settings

    module = ModuleType("sglang")
    module.Engine = Engine
    monkeypatch.setitem(sys.modules, "sglang", module)
    monkeypatch.setattr(inprocess, "installed_version", lambda: "0.5.17")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")  # which a CPU engine sets, put back at the end
    return Engine


def test_they_reach_the_engine_over_our_own(engine, tmp_path):
    EngineTransport(tmp_path, "cpu", "float32", False, {"mem-fraction-static": 0.1, "page_size": 16, "tp_size": 2})
    made = engine.made
    assert (made["mem_fraction_static"], made["page_size"], made["tp_size"]) == (0.1, 16, 2)
    assert made["model_path"] == str(tmp_path) and made["attention_backend"] == "torch_native"


def test_a_value_that_sglang_refuses_is_a_clear_error(engine, tmp_path):
    with pytest.raises(ValueError, match=r"does not start: AssertionError: a share.*'mem_fraction_static': 3"):
        EngineTransport(tmp_path, "cpu", "float32", False, {"mem_fraction_static": 3})
    with pytest.raises(ValueError, match="did you mean tp_size"):
        EngineTransport(tmp_path, "cpu", "float32", False, {"tpsize": 2})
