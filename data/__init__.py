"""Floor 1: bytes on disk, token streams, tokenizer and corpus preparation.

What lives here: `indexed/` the .bin/.idx files, `stream/` which window is sample t, `tokenizer/`
the byte-level BPE, `corpus/` from source texts to indexed files. What may not: torch, collectives,
or anything from another room. numpy everywhere; tokenizers in `tokenizer/` only; pyarrow and
zstandard in `corpus/` only.
"""
