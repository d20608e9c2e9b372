"""Tokenizer: train a byte-level BPE, and turn text into ids and back.

The only folder that imports the `tokenizers` package. What may not live here: reading of sources.
"""
