"""Evaluation: real episodes through the embedded engine, counted by kind and by whether the low view suffices."""
