"""How much memory does the loss take, and how long, with and without all logits at once?

    python tests/bench/bench_loss.py [--json FILE] [--repeats N] [--threads N] [--tokens N]

Forward and backward of head and loss, fp32, each way in a process of its own, in turn:

- megatron: the head's product and megatron-core's vocab_parallel_cross_entropy, as in the model;
- torch: the same product and torch's cross_entropy;
- summed, by token: the two functions of kernels/cross_entropy.py.

Memory: A.X K1's 163,840 words, 4,096 tokens, hidden 256: the peak of resident memory above what
hidden states and weight had taken; the gradients of both are in it. Time: words and hidden size of
conf/model/axk1_20m.yaml, the demo's 1,024 tokens, all ways in one process, in turn. Ends with 1 if
the summed loss takes more than a quarter of megatron's memory or another loss comes out.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.cross_entropy import cross_entropy, summed_cross_entropy
from launch.compose import from_yaml
from parallel.groups import join_world, leave_world, start_groups
from parallel.layout import Layout
from pretrain.model.spec import ModelSpec
from tests.bench.memory import peak_mib
from tests.bench.provenance import parser, write_result

LARGE = {"num_tokens": 4096, "hidden_size": 256, "num_words": 163_840}
DEMO_TOKENS = 1024
TARGET_MEMORY, LOSS_RTOL = 0.25, 1e-6


def draw(*, num_tokens: int, hidden_size: int, num_words: int) -> tuple[Tensor, ...]:
    """Return hidden states, weight, labels and loss mask."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight_VD = torch.randn(num_words, hidden_size).mul_(0.05).requires_grad_()
    labels_T = torch.randint(0, num_words, (num_tokens,))
    return hidden_TD, weight_VD, labels_T, torch.ones(num_tokens)


def megatron(h: Tensor, w: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the loss as megatron's head and loss compute it."""
    token_loss: Any = vocab_parallel_cross_entropy(F.linear(h, w)[:, None], labels[:, None])
    return (token_loss[:, 0] * mask).sum()


def plain(h: Tensor, w: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return torch's own loss."""
    return (F.cross_entropy(F.linear(h, w), labels, reduction="none") * mask).sum()


def summed(h: Tensor, w: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the loss whose gradient is computed in the forward pass."""
    return summed_cross_entropy(h, weight_VD=w, labels_T=labels, token_weight_T=mask)[0]


def by_token(h: Tensor, w: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the loss whose logits are computed twice."""
    return (cross_entropy(h, weight_VD=w, labels_T=labels) * mask).sum()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "megatron": megatron,
    "torch": plain,
    "summed": summed,
    "by token": by_token,
}


def take(way: str, sizes: dict[str, int]) -> dict[str, float]:
    """Return what one forward and backward pass of `way` takes in this process."""
    inputs = draw(**sizes)
    small = draw(num_tokens=8, hidden_size=8, num_words=8)
    WAYS[way](*small).backward()  # libraries that are loaded at the first call are not counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = peak_mib()
    started = time.perf_counter()
    loss = WAYS[way](*inputs)
    loss.backward()
    seconds = time.perf_counter() - started
    return {
        "loss": loss.item() / sizes["num_tokens"],
        "peak_mib": peak_mib() - before,
        "seconds": seconds,
    }


def timed(sizes: dict[str, int], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of forward and backward of each way, taken in turn."""
    inputs = draw(**sizes)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_idx in range(repeats + 2):
        for way, loss in WAYS.items():
            inputs[0].grad = inputs[1].grad = None
            started = time.perf_counter()
            loss(*inputs).backward()
            if round_idx > 1:
                times[way].append((time.perf_counter() - started) * 1e3)
    return times


def in_a_process(*words: str) -> Any:
    """Return what this file prints as JSON when it is called with `words`."""
    command = [sys.executable, __file__, *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(way: str, options: Any) -> None:
    """Measure in this process and print JSON."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        join_world(store=FileStore(str(Path(folder) / "store"), 1), rank=0, num_ranks=1)
        start_groups(Layout())
        if way == "all":
            spec = from_yaml(ModelSpec, (ROOT / "conf/model/axk1_20m.yaml").read_text("utf-8"))
            sizes = {"hidden_size": spec.hidden_size, "num_words": spec.vocab_size}
            told: Any = timed(sizes | {"num_tokens": DEMO_TOKENS}, options.repeats)
        else:
            told = take(way, LARGE | {"num_tokens": options.tokens})
        leave_world()
    print(json.dumps(told))


def main() -> int:
    """Measure both and print them; 1 if a bar is missed."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=40, help="timed passes of each way")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--tokens", type=int, default=LARGE["num_tokens"])
    arguments.add_argument("--child", choices=[*WAYS, "all"], help="for its own processes")
    options = arguments.parse_args()
    if options.child:
        child(options.child, options)
        return 0
    said = [f"--{name}={getattr(options, name)}" for name in ("repeats", "threads", "tokens")]
    memory = {way: in_a_process("--child", way, *said) for way in WAYS}
    times = in_a_process("--child", "all", *said)
    reference, loss = memory["megatron"]["peak_mib"], memory["megatron"]["loss"]
    rows = [
        {
            "way": way,
            "peak_mib": memory[way]["peak_mib"],
            "memory_ratio": memory[way]["peak_mib"] / reference,
            "loss_error": abs(memory[way]["loss"] / loss - 1),
            "large_seconds": memory[way]["seconds"],
            "demo_min_ms": min(times[way]),
            "demo_median_ms": statistics.median(times[way]),
            "time_ratio": min(times[way]) / min(times["megatron"]),
        }
        for way in WAYS
    ]
    print("way        peak MiB  ratio  loss differs  large s  demo min ms  median ms  ratio")
    for r in rows:
        print(
            f"{r['way']:<9} {r['peak_mib']:>9,.0f} {r['memory_ratio']:>6.3f}"
            f" {r['loss_error']:>13.1e} {r['large_seconds']:>8.1f} {r['demo_min_ms']:>12.1f}"
            f" {r['demo_median_ms']:>10.1f} {r['time_ratio']:>6.3f}"
        )
    ours = rows[2]
    print(f"target: summed <= {TARGET_MEMORY} of megatron's memory, <= 1 of its time")
    write_result(
        options.json,
        **(LARGE | {"num_tokens": options.tokens}),
        demo_tokens=DEMO_TOKENS,
        threads=options.threads,
        rows=rows,
    )
    wrong = [r for r in rows if r["loss_error"] > LOSS_RTOL]
    return int(bool(wrong) or ours["memory_ratio"] > TARGET_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
