"""The model as others read it: tensors under the names of the Hugging Face hub.

`names.py` is the one table between megatron-core's parameters and the hub's. Nothing here knows
about steps, data or ranks; transformers and vLLM are what the files are for, never what they are
made with.
"""
