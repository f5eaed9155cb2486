"""Training examples: JSONL in, an order that can be stopped and continued."""
