"""How new weights reach the engine that generates."""
