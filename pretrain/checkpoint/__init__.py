"""Checkpoints: what is written, when it counts as whole, where a run goes on.

`sharded.py` writes and reads tensors through megatron's dist_checkpointing; `manifest.py` says what
a whole checkpoint is; `resume.py` finds the newest whole one. Knows models and optimizers as things
with a sharded state, no more.
"""
