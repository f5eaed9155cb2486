"""The engine in this process: paged KV, radix cache, continuous batching, one worker thread."""

from vtengine.engine.embedded.config import EngineConfig, PoolTooSmall
from vtengine.engine.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine", "EngineConfig", "PoolTooSmall"]
