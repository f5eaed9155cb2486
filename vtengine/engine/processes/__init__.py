"""Engines in processes of their own, side by side: one for each GPU, or for a share of the cores."""

from vtengine.engine.processes.data_parallel import DataParallel
from vtengine.engine.processes.engine_process import EngineLost, EngineProcess

__all__ = ["DataParallel", "EngineLost", "EngineProcess"]
