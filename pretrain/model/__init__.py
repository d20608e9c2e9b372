"""The model: its sizes, its parts as megatron-core specs, its assembly on one rank.

`spec.py` holds every size in the report's words; megatron's names appear in `transformer_config.py`
and `assemble.py` only. Nothing here knows about data, steps or checkpoints.
"""
