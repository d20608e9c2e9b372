"""Pure tensor functions, each with its plain twin in the same file.

Imports nothing of ours and never a collective: positions and groups are passed in as numbers and
    callables. `backend.py` is the only file that probes what this machine offers.
"""
