"""ZeRO-3 and the exact fp32 shards of W. `zero3` alone imports DeepSpeed."""
