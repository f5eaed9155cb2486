"""glance: a small generated world of pictures with questions, some of which only the high view answers."""

from vtengine_training.glance.generate import SPLITS, guess, make_scene
from vtengine_training.glance.scene import KINDS, Glyph, Mark, Query, Scene, needs_high

__all__ = ["KINDS", "SPLITS", "Glyph", "Mark", "Query", "Scene", "guess", "make_scene", "needs_high"]
