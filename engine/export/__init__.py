"""The trained model as a Hugging Face folder or a LoRA adapter, streamed from the shards."""
