"""Supervised cold start: from nothing to a model that answers in the protocol's format."""
