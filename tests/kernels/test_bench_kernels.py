"""Do the ways that bench_kernels.py times compute the same thing, and does it say what it needs?"""

import argparse

import pytest
import torch

from tests.bench import kernel_cases
from tests.bench.bench_kernels import MOST_ERROR, error_of, gradients_of, main
from tests.bench.kernel_cases import CASES


@pytest.mark.parametrize("make", CASES)
def test_the_ways_of_a_case_agree(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "NUM_WORDS", 1000)  # 163,840 take seconds on a CPU
    torch.manual_seed(0)
    case = make(24, 256, device="cpu")  # type: ignore[operator]  an object that is called
    ways = {name: way for name, way in case.ways.items() if name in ("ours", "torch")}
    results = {name: way() for name, way in ways.items()}
    gradients = {name: gradients_of(case, outputs) for name, outputs in results.items()}
    assert error_of(results["ours"], results["torch"]) < MOST_ERROR / 2
    assert error_of(gradients["ours"], gradients["torch"]) < MOST_ERROR / 2


def test_another_result_is_seen() -> None:
    x = torch.randn(100)
    assert error_of([x, 1.1 * x], [x, x]) > MOST_ERROR


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_returns_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argparse.Namespace()) == 2
    assert "needs a GPU" in capsys.readouterr().out
