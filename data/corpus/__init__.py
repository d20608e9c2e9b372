"""Corpus preparation: sources, near-duplicate split, tokenised output folder and its manifest.

What may not live here: the order in which training reads the result (that is `stream/`).
"""
