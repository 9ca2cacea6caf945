"""Shapes of well-known models."""

from pipeline.plan import memory_need

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


SHAPE = memory_need.shape_from_config(LLAMA)
