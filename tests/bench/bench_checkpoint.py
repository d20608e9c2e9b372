"""How long does training stand still for a checkpoint, asynchronous and synchronous?

    python tests/bench/bench_checkpoint.py [--json FILE] [--saves N]

One rank trains the proxy of 100M parameters (conf/model/axk1_100m.yaml) in fp32 with AdamW: weights
and two moments. Saves are taken in turn: an asynchronous one, beside which steps are taken until it
is committed, and a synchronous one, for which training waits. Both are the trainer's own saver
(pretrain/checkpoint/saver.py), to the same disk, with digests, syncs and read-back. The first
asynchronous save also takes the memory that later ones use again.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.compose import from_yaml
from parallel.groups import join_world, leave_world
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.optimizer_state import num_updates
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.checkpoint.saver import Outcome, Saver, SaverConfig
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.run import AdamW
from pretrain.training.train_step import micro_batches, train_step
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving import twin

ADAMW = AdamW(lr=1e-4)
NUM_SEQUENCES, SEQUENCE_TOKENS = 1, 128
TARGET_RATIO = 0.1
READ_BACK = 1 / 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One save."""

    kind: str
    number: int
    blocking_s: float
    """Training stood still."""
    total_s: float
    """From the begin to the commit."""
    steps_beside: int
    """Steps taken meanwhile."""


class Bench:
    """The proxy, its optimizer and a saver."""

    def __init__(self, root: Path) -> None:
        spec = from_yaml(ModelSpec, (ROOT / "conf/model/axk1_100m.yaml").read_text("utf-8"))
        self.model = twin.build_ours(spec)
        self.chunks = wrap_chunks([self.model], config=self.model.config, adamw=ADAMW)
        precision = Precision(kind="fp32")
        self.optimizer = make_optimizer(self.chunks, adamw=ADAMW, precision=precision)
        windows = torch.randint(0, spec.vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1))
        domains = torch.zeros(NUM_SEQUENCES, dtype=torch.int64)
        self.batches = list(micro_batches(windows, domains, micro_sequences=NUM_SEQUENCES))
        config = SaverConfig(root=root, keep=1, read_back=READ_BACK, token="bench")
        self.saver = Saver(config, device=torch.device("cpu"))
        self.num_steps = 0

    def step(self) -> float:
        """Take a step and return its seconds."""
        started = time.perf_counter()
        clip = ADAMW.clip_norm
        train_step(self.chunks, self.optimizer, self.batches, lr=ADAMW.lr, clip_norm=clip)
        self.num_steps += 1
        return time.perf_counter() - started

    def begin(self) -> float:
        """Begin a save and return the seconds that it blocked."""
        started = time.perf_counter()
        manifest = Manifest(
            step=self.num_steps,
            sequences=0,
            tokens=0,
            tokenizer_digest="",
            config={},
            versions={},
            files={},
            updates=num_updates(self.optimizer),
        )
        self.saver.begin(lambda: pieces_of_rank(self.chunks, self.optimizer), manifest)
        return time.perf_counter() - started

    def outcome(self) -> Outcome:
        """Return how the save went that has ended."""
        outcome = self.saver.take_outcome()
        assert outcome is not None, "it has ended"
        if outcome.problem:
            sys.exit(f"a save failed: {outcome.problem}")
        return outcome


def asynchronous(bench: Bench, number: int) -> tuple[Row, list[float]]:
    """Save beside training; return the row and the seconds of the steps beside it."""
    blocking_s = bench.begin()
    beside: list[float] = []
    while bench.saver.is_busy:
        beside.append(bench.step())
    outcome = bench.outcome()
    row = Row(
        kind="asynchronous",
        number=number,
        blocking_s=blocking_s,
        total_s=outcome.duration_s,
        steps_beside=len(beside),
    )
    return row, beside


def synchronous(bench: Bench, number: int) -> tuple[Row, list[float]]:
    """Save while training waits."""
    started = time.perf_counter()
    bench.begin()
    bench.saver.wait()
    outcome = bench.outcome()
    blocking_s = time.perf_counter() - started
    row = Row(
        kind="synchronous",
        number=number,
        blocking_s=blocking_s,
        total_s=outcome.duration_s,
        steps_beside=0,
    )
    return row, []


def main() -> int:
    """Run the bench; 0 if the ratio is reached."""
    arguments = parser(__doc__)
    arguments.add_argument("--saves", type=int, default=5, help="of each kind, at least 2")
    options = arguments.parse_args()
    torch.manual_seed(0)
    kinds: list[Callable[[Bench, int], tuple[Row, list[float]]]] = [asynchronous, synchronous]
    rows: list[Row] = []
    beside: list[float] = []
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        join_world(store=FileStore(f"{folder}/store", 1), rank=0, num_ranks=1)
        bench = Bench(Path(folder) / "checkpoints")
        num_parameters = sum(p.numel() for p in bench.model.parameters())
        bench.step()
        for number in range(1, options.saves + 1):
            for kind in kinds:
                alone += [bench.step() for _ in range(2)]
                row, steps = kind(bench, number)
                rows.append(row)
                beside += steps
        num_bytes = bench.saver.num_bytes
        leave_world()
    print(f"{num_parameters:,} parameters, {num_bytes / 1e9:.2f} GB of state in fp32\n")
    print("save          number  training waits  until committed  steps beside it")
    for row in sorted(rows, key=lambda row: row.kind):
        print(
            f"{row.kind:<13} {row.number:>6} {row.blocking_s * 1e3:>12.0f} ms"
            f" {row.total_s:>14.2f} s {row.steps_beside:>16}"
        )
    later = {kind: [r.blocking_s for r in rows if r.kind == kind and r.number > 1] for kind in
             ("asynchronous", "synchronous")}  # fmt: skip
    ratio = max(later["asynchronous"]) / min(later["synchronous"])
    median = statistics.median(later["asynchronous"]) / statistics.median(later["synchronous"])
    slower = statistics.median(beside) / statistics.median(alone)
    print(
        f"\nfrom the second save on, asynchronous over synchronous: {median:.3f} (medians),"
        f" {ratio:.3f} (longest over shortest); target at most {TARGET_RATIO}"
    )
    print(f"a step beside a save takes {slower:.2f} times as long as one without (medians)")
    write_result(
        options.json,
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        rows=[asdict(row) for row in rows],
        ratio_of_medians=median,
        longest_over_shortest=ratio,
        target_ratio=TARGET_RATIO,
        step_beside_over_alone=slower,
    )
    return 0 if ratio <= TARGET_RATIO else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
