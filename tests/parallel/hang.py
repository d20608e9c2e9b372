"""Ranks that hang, for the test of what is said about them; run inside a pool."""

import signal

import torch


def wait(role: int) -> None:
    """Wait in a collective (0), wait elsewhere (1), or return at once (2)."""
    {0: enter, 1: never_enter, 2: int}[role]()


def enter() -> None:
    """Enter a collective."""
    torch.distributed.barrier()


def never_enter() -> None:
    """Wait for nothing, in a call of the system."""
    while True:
        signal.pause()
