"""The GRPO trainer: one process, one model that both generates and learns."""
