"""A look finds numbers that are none, in little memory, and fails no step for lack of it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.training import origin

MAX = torch.finfo(torch.bfloat16).max
is_finite: Callable[[Any], bool] = origin._is_finite  # pyright: ignore[reportPrivateUsage]  the look itself


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many bytes were looked at in one piece each time; at most 1 KiB is allowed."""
    monkeypatch.setattr(origin, "_LOOK_BYTES", 1024)
    sizes: list[int] = []
    isfinite = torch.isfinite

    def recorded(values: Tensor) -> Tensor:
        sizes.append(values.numel() * values.element_size())
        return isfinite(values)

    monkeypatch.setattr(torch, "isfinite", recorded)
    return sizes


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 3333, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_none_is_seen_without_a_copy_of_the_whole(
    wrong: float, at: int, dtype: torch.dtype, looked_at: list[int]
) -> None:
    values = torch.ones(5, 7, 211, dtype=dtype)
    assert is_finite((values, [values, 3]))
    values.view(-1)[at] = wrong
    assert not is_finite(values.transpose(0, 2))
    assert max(looked_at) <= 1024


def test_numbers_whose_sum_overflows_are_finite(looked_at: list[int]) -> None:
    values = torch.full((3, 4001), MAX, dtype=torch.bfloat16)
    assert values.sum().isinf()
    assert is_finite(values)
    assert max(looked_at) <= 1024


def test_a_look_that_finds_no_memory_has_seen_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(torch, "isfinite", no_memory)
    with caplog.at_level(logging.WARNING):
        assert is_finite((torch.full((2, 3), float("nan")),))
    assert "no memory left to look at [2, 3] torch.float32" in caplog.text
