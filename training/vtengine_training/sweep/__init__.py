"""Sweeps: one training configuration with some of its keys varied, run after run."""
