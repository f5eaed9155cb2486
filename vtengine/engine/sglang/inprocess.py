"""SGLang's engine in this process: `sglang.Engine`, whose scheduler runs in a process of its own."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncGenerator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.sglang.arguments import checked
from vtengine.engine.sglang.checks import PINNED, check_version, wrong_model
from vtengine.engine.sglang.hooks import PLUGIN, PLUGINS, VARIABLE, chosen_hooks
from vtengine.engine.sglang.http import hooks_of
from vtengine.engine.sglang.transport import NOT_OFFERED, ConnectionLost, ServerFacts

if TYPE_CHECKING:
    from vtengine.engine.sglang.served import ServedModel

# Page sizes above 1 round a resumed prefix down. mm_preprocess_cache_size_mb stays off: with it, a repeated request was
# seen to differ from a cold one.
OURS: dict[str, Any] = {"enable_multimodal": True, "page_size": 1, "skip_server_warmup": True, "log_level": "error"}
ON_CPU: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
}
CPU_FLAG, FEATURE_CACHE_MB = "SGLANG_USE_CPU_ENGINE", "SGLANG_VLM_CACHE_SIZE_MB"


def installed_version() -> str:
    """Raises ValueError with the remedy where SGLang is missing or of another version."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise ValueError(
            f"backend sglang: SGLang is not installed here: pip install sglang=={PINNED} (on a machine without a GPU: "
            "make sglang-venv), or give the address of a running server"
        ) from None
    check_version(found, "backend sglang")
    return found


def ask_for_flush() -> bool:
    """Chooses our plugin's hook that empties the feature cache; False where SGLang would not load the plugin."""
    names = {point.name for point in entry_points(group=PLUGINS)}
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if PLUGIN not in names or (allowed and PLUGIN not in allowed):
        return False
    hooks = [*chosen_hooks(), "flush"]
    os.environ[VARIABLE] = ",".join(dict.fromkeys(hooks))
    return True


def _input_name(call: str) -> str:
    """What SGLang calls the arguments of a call: release_memory_occupation -> ReleaseMemoryOccupationReqInput."""
    name = call.replace("weights_from_disk", "weight_from_disk")
    return "".join(word.capitalize() for word in name.split("_")) + "ReqInput"


class EngineTransport:
    """updatable: image features must not outlive an update of the vision tower. Our plugin's hook empties their cache;
    where the plugin is not installed, they are not kept."""

    takes_tensors = True
    is_child = True

    def __init__(self, folder: Path, device: str, dtype: str, updatable: bool, arguments: dict[str, Any]) -> None:
        self.where = "sglang engine"
        self._version = installed_version()
        kind = device.split(":")[0]
        if kind == "cpu":
            os.environ[CPU_FLAG] = "1"
        if updatable and not ask_for_flush():
            os.environ[FEATURE_CACHE_MB] = "0"  # read by the scheduler's process, which inherits it
        settings = {"model_path": str(folder), "device": kind, "dtype": dtype} | OURS
        if ":" in device:
            settings["base_gpu_id"] = int(device.split(":")[1])
        import sglang

        known = inspect.signature(sglang.Engine.server_args_class).parameters
        settings |= (ON_CPU if kind == "cpu" else {}) | checked(arguments, known, self._version)
        try:
            self._engine = sglang.Engine(**settings)
        except (TypeError, ValueError, AssertionError) as error:  # an argument that it does not take
            message = f"backend sglang: SGLang does not start: {type(error).__name__}: {error}"
            raise ValueError(f"{message}; engine arguments were {arguments or 'none'}") from error
        self._settings = settings

    async def facts(self) -> ServerFacts:
        config = self._manager.model_config.hf_config
        return ServerFacts(
            version=self._version,
            model_path=str(self._settings["model_path"]),
            model_type=getattr(config, "model_type", None),
            weight_version=str(self._manager.config_value("weight_version")),
            incremental=bool(self._settings.get("incremental_streaming_output")),
            radix_cache=not self._settings.get("disable_radix_cache"),
            rl_on_policy_target=self._settings.get("rl_on_policy_target"),
            tp_size=int(self._settings.get("tp_size", 1)),
            hooks=hooks_of(await self._manager.get_internal_state()),
        )

    async def check_model(self, model: ServedModel) -> None:
        config = self._manager.model_config
        theirs = (config.vocab_size, config.hf_config.image_token_id)
        if theirs != (model.vocab_size, model.image_token_id):
            raise wrong_model(self.where, model, f"vocabulary and image id are {theirs} there")

    async def send(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        known = {name: value for name, value in payload.items() if name != "return_prompt_token_ids"}
        try:
            async for chunk in await self._engine.async_generate(**known):
                yield chunk
        except ValueError as error:
            raise RequestRejected("refused_by_server", f"{self.where}: {error}", "unclear") from None
        except (BackendFailed, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise ConnectionLost(f"{self.where}: {type(error).__name__}: {error}") from error

    async def abort(self, rid: str) -> None:
        self._manager.abort_request(rid=rid)

    async def flush(self) -> bool:
        return bool((await self._manager.flush_cache()).success)

    async def control(self, call: str, **fields: Any) -> tuple[bool, str]:
        from sglang.srt.managers import io_struct

        kind = getattr(io_struct, _input_name(call), None)
        if kind is None or not hasattr(self._manager, call):
            return False, NOT_OFFERED
        answer = await getattr(self._manager, call)(kind(**fields), None)
        if answer is None:  # release and resume of memory say nothing
            return True, ""
        ok, message, *_ = answer
        return bool(ok), str(message)

    async def set_version(self, version: str) -> None:
        if not hasattr(self._manager, "update_weight_version"):  # before 0.5.19
            self._manager.record_config_updates("vtengine", weight_version=version)
            return
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        named = UpdateWeightVersionReqInput(new_version=version, abort_all_requests=False)
        await self._manager.update_weight_version(named)

    async def close(self) -> None:
        """Ends the scheduler's process; blocks for its seconds."""
        self._engine.shutdown()

    @property
    def _manager(self) -> Any:
        """Not public API of SGLang, like flush_cache and update_weights_from_disk on it: the public calls of these
        block the event loop that generation runs on."""
        return self._engine.tokenizer_manager
