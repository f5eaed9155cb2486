"""The GRPO trainer: one process or several, over the embedded engine or SGLang."""
