"""Token files: megatron's .bin/.idx pair, shards of packed windows, and datasets of shards.

All are written whole or not at all, and checked when they are read. What may not live here: text,
tokenizers, sampling order.
"""
