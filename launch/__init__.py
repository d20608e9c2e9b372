"""Commands: one file, one verb; anything longer than a screen has a room below.

May import every room. hydra is imported here only; omegaconf in `compose.py` and `submit.py` only.
The file exists so that `launch` is a package although its scripts are started by path.
"""
