"""Where a run's metrics go: a JSONL always, and what the configuration names beside it."""
