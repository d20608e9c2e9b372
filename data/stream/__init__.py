"""Order: which window of which domain is sample number t, as a pure function without state.

What may not live here: text, tokenizers, ranks and process groups (the caller passes sample
numbers).
"""
