"""Token files: the megatron-compatible .bin/.idx pair, its atomic writer and its checking reader.

What may not live here: text, tokenizers, sampling order.
"""
