"""Chat: how turns of a conversation become a prompt, with and without thinking.

What may not live here: a template engine, training of the tokenizer, generation. Standard library
only: a tokenizer is the parsed JSON of its file.
"""
