"""Are the Triton kernels worth having? Time and bytes per second on a GPU, beside the others'.

    python tests/bench/bench_kernels.py --json docs/figures/bench_kernels.json

Every way to compute an operator starts from the same tensors and is timed in turn; the forward pass
keeps what the backward pass needs. Bytes are those that the operator must move at least, whoever
computes it, so a way that moves more shows fewer a second; the last column sets them beside a copy
of 1 GiB, read and written, in the same run. The cache is emptied before each call. The results of
the ways are compared first: exit code 1 if they disagree, 2 where there is no GPU.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.kernel_cases import CASES, Case
from tests.bench.provenance import parser, write_result

COPY_BYTES = 2**30
CACHE_BYTES = 2**28  # more than the 50 MB of an H100
WARM_UPS = 10
# bf16 keeps 2^-8 of a value, and the ways round one to four times on their way
MOST_ERROR = 2**-5


def seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Return the median seconds of a call on the GPU; the host waits for the device at the end."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS):
        call()
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(repeats):
        cache.zero_()  # also gives the host the time to queue the call
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def copy_bytes_per_s(*, repeats: int) -> float:
    """Return bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), repeats=repeats)


def gradients_of(case: Case, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the leaves; what they need stays for another time."""
    return torch.autograd.grad(outputs, case.leaves, case.gradients, retain_graph=True)


def error_of(given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of two ways, of the root mean square of each tensor."""
    worst = 0.0
    for mine, other in zip(given, expected, strict=True):
        rms = other.detach().float().square().mean().sqrt().clamp(min=1e-30)
        difference = (mine.detach().float() - other.detach().float()).square().mean().sqrt()
        worst = max(worst, (difference / rms).item())
    return worst


def rows_of(case: Case, *, copy: float, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each way and direction."""
    rows: list[dict[str, Any]] = []
    expected = case.ways["torch"]()
    expected_gradients = gradients_of(case, expected)
    for name, way in case.ways.items():
        try:
            outputs = way()
            gradients = gradients_of(case, outputs)
        except Exception as error:  # another's package, built for another machine or version
            if name == "ours":
                raise
            print(f"{case.name}: {name} left out: {error}")
            continue
        error = max(error_of(outputs, expected), error_of(gradients, expected_gradients))
        calls = {
            "forward": (way, case.forward_bytes),
            "backward": (lambda kept=outputs: gradients_of(case, kept), case.backward_bytes),
        }
        for direction, (call, num_bytes) in calls.items():
            taken = seconds(call, repeats=repeats)
            row = {"case": case.name, "direction": direction, "way": name, "seconds": taken}
            row |= {"bytes_per_s": num_bytes / taken, "of_copy": num_bytes / taken / copy}
            rows.append(row | {"error": error})
    return rows


def main(arguments: argparse.Namespace) -> int:
    """Time everything, print the table, write the JSON; return the exit code."""
    if not torch.cuda.is_available():
        print("bench_kernels.py needs a GPU, and torch sees none here: nothing was timed")
        return 2
    torch.manual_seed(0)
    copy = copy_bytes_per_s(repeats=arguments.repeats)
    device = torch.cuda.get_device_name()
    print(f"{device}, a copy moves {copy / 1e12:.2f} TB/s")
    print(
        f"{'case':26} {'direction':9} {'way':20} {'us':>8} {'TB/s':>6} {'of copy':>7} {'error':>8}"
    )
    rows: list[dict[str, Any]] = []
    for make in CASES:
        case = make(arguments.tokens, arguments.hidden, device="cuda")
        if arguments.only not in case.name:
            continue
        for row in rows_of(case, copy=copy, repeats=arguments.repeats):
            rows.append(row)
            print(
                f"{row['case']:26} {row['direction']:9} {row['way']:20} {1e6 * row['seconds']:8.1f}"
                f" {row['bytes_per_s'] / 1e12:6.2f} {row['of_copy']:7.2f} {row['error']:8.1e}",
                flush=True,
            )
    wrong = [row for row in rows if row["error"] > MOST_ERROR]
    for row in wrong:
        print(f"{row['case']}: {row['way']} is not what torch computes, error {row['error']:.1e}")
    figures = {"device": device, "copy_bytes_per_s": copy, "rows": rows}
    sizes = {"num_tokens": arguments.tokens, "hidden_size": arguments.hidden}
    write_result(arguments.json, **figures, **sizes)
    return 1 if wrong else 0


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--tokens", type=int, default=8192, help="rows of the residual stream")
    words.add_argument("--hidden", type=int, default=7168, help="its width; 7168 in A.X K1")
    words.add_argument("--repeats", type=int, default=50, help="timed calls of each way")
    words.add_argument("--only", default="", help="part of a case's name")
    sys.exit(main(words.parse_args()))
