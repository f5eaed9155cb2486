"""Our plugin for SGLang, through its public hook registry: entry point `vtengine` of the group `sglang.srt.plugins`.

SGLang runs `register` in each of its processes. It does nothing unless VTENGINE_SGLANG_HOOKS in the environment names
hooks, separated by commas:

    flush      emptying the radix cache empties the cache of image features too, so that new vision weights count
    patchify   images that arrive as encoded bytes are decoded and resized by our code, not by SGLang's

/server_info then says which of them are at work, in internal_states[i]["vtengine_hooks"].
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

PLUGINS, PLUGIN = "sglang.srt.plugins", "vtengine"
VARIABLE = "VTENGINE_SGLANG_HOOKS"
HOOKS = ("flush", "patchify")
STATE = "vtengine_hooks"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
FEATURE_CACHES = ("sglang.srt.managers.mm_utils", "sglang.srt.managers.mm_schedule")  # 0.5.17; newer


def register() -> None:
    """Raises ValueError for a hook that does not exist (SGLang logs it and goes on without any)."""
    chosen = chosen_hooks()
    if not chosen:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def report(result: Any, *_: Any, **__: Any) -> None:
        result.internal_state[STATE] = list(chosen)

    HookRegistry.register(f"{SCHEDULER}.get_internal_state", report, HookType.AFTER)
    if "flush" in chosen:
        HookRegistry.register(f"{SCHEDULER}.flush_cache", clear_features, HookType.AFTER)
    if "patchify" in chosen:
        from vtengine.engine.sglang.hooked_processor import LOAD_IMAGE, PREPROCESS, load_with_pillow, preprocess

        HookRegistry.register(LOAD_IMAGE, load_with_pillow, HookType.AROUND)
        HookRegistry.register(PREPROCESS, preprocess, HookType.AROUND)


def chosen_hooks() -> tuple[str, ...]:
    """Those that the environment names. Raises ValueError."""
    names = tuple(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    if unknown := [name for name in names if name not in HOOKS]:
        raise ValueError(f"{VARIABLE} = {unknown}: hooks are {', '.join(HOOKS)}")
    return names


def clear_features(flushed: bool, *_: Any, **__: Any) -> None:
    """After Scheduler.flush_cache: the features that the vision tower computed go as well."""
    if not flushed:
        return
    for name in FEATURE_CACHES:
        try:
            cache = import_module(name).embedding_cache
        except (ImportError, AttributeError):
            continue
        if cache is not None:
            cache.clear()
            return
    raise RuntimeError("vtengine's hook `flush`: this SGLang keeps its image features elsewhere; leave the hook out")
