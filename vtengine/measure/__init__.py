"""What a model costs under load: questions that come in a stated way, and figures about the rows they became."""

from vtengine.measure.figures import Level, figures
from vtengine.measure.load import Load, run_load

__all__ = ["Level", "Load", "figures", "run_load"]
