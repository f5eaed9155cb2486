"""Low-rank adapters (LoRA) on the model, by the peft library: what is trained in their stead, merged, and written."""
