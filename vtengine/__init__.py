"""Two-turn visual question answering: a quarter of the pixels first, the full image only when the model asks.

Importing this package loads nothing; take what you need from its parts:
`vtengine.protocol`, `vtengine.vision`, `vtengine.model`, `vtengine.engine`, `vtengine.rollout`.
"""

__version__ = "0.1.0"
