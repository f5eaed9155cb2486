"""Is this SGLang one that we can work with? Asked once, before the first request."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from vtengine.engine.sglang.transport import ServerFacts, ServerUnsuitable

if TYPE_CHECKING:
    from vtengine.engine.sglang.served import ServedModel

PINNED, NEWEST = "0.5.17", "0.5.23"
"""The versions that the tests with a real SGLang were run with: docs/versions.md."""
TOO_NEW = (0, 6)
MODEL_TYPE = "qwen2_5_vl"

log = logging.getLogger(__name__)


def check_version(version: str, where: str) -> None:
    """Raises ServerUnsuitable outside of PINNED <= version < 0.6; warns of one that is newer than any that was run."""
    found = _numbers(version)
    if not _numbers(PINNED) <= found < TOO_NEW:
        raise ServerUnsuitable(
            f"{where}: is SGLang {version}; vtengine works with {PINNED} to {NEWEST}: pip install sglang=={PINNED}"
        )
    if found > _numbers(NEWEST):
        log.warning("%s: is SGLang %s, newer than any that vtengine was run with (%s)", where, version, NEWEST)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def check_facts(facts: ServerFacts, model: ServedModel, where: str, takes_tensors: bool) -> None:
    """Raises ServerUnsuitable; logs what works but is not what one wants."""
    check_version(facts.version, where)
    if facts.model_type not in (None, MODEL_TYPE):
        raise wrong_model(where, model, f"it serves a {facts.model_type} ({facts.model_path}), not a {MODEL_TYPE}")
    if facts.rl_on_policy_target:
        raise ServerUnsuitable(
            f"{where}: runs with --rl-on-policy-target {facts.rl_on_policy_target}, which replaces the positions of "
            "image tokens by plain ones: wrong for this model. Start it without; use --enable-deterministic-inference"
        )
    if facts.skips_tokenizer and not takes_tensors:
        raise ServerUnsuitable(f"{where}: runs with --skip-tokenizer-init, but images over HTTP need its tokenizer")
    if not facts.radix_cache:
        log.warning("%s: its radix cache is off, so turn 2 computes all of turn 1 again", where)


def wrong_model(where: str, model: ServedModel, difference: str) -> ServerUnsuitable:
    return ServerUnsuitable(
        f"{where}: wrong model on the server: {difference}. Ours is {model.name}; start the server with that "
        "--model-path, or give --model the folder that it serves"
    )
