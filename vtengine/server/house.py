"""What all requests of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtengine.rollout.group import Setting
from vtengine.server.admission import Gate
from vtengine.server.config import ServerLimits
from vtengine.server.keys import ApiKeys
from vtengine.server.metrics import Metrics


@dataclass(frozen=True)
class House:
    """setting: backend, pipeline, tokenizer, profile, and the limits and sampling where a request states none.

    model: the name that requests must give. created_s: Unix time of the start.
    """

    setting: Setting
    limits: ServerLimits
    model: str
    keys: ApiKeys
    gate: Gate
    metrics: Metrics
    created_s: int = field(default=0)

    @property
    def has_engine(self) -> bool:
        """False once its engine is lost for good."""
        return not getattr(self.setting.backend, "is_closed", False)
