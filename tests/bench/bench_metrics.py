"""What does it cost to measure a run?

    python tests/bench/bench_metrics.py [--json FILE] [--repeats N] [--interval STEPS]

One rank trains the demo's model (conf/model/axk1_tiny.yaml) on 1,024 tokens a step, as each of the
demo's two ranks does: without what measures (pretrain/training/step_metrics.py), with it switched
off, as in most steps, and with it switched on and read, as in every `--interval`th. The three take
turns, so that a disturbance of the machine meets all. The price is that of an average step.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.stream.order import Segment
from launch.compose import from_yaml
from parallel.device import Device
from parallel.groups import join_world, leave_world
from parallel.layout import Layout
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.training.clip import GradientClip
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.run import AdamW
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.train_step import StepResult, micro_batches, train_step
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving import twin

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 256
ADAMW = AdamW(lr=1e-4)
BUCKETS = [SimpleNamespace(domain=name) for name in ("a", "b")]
SEGMENT = Segment(num_batches=1, global_sequences=NUM_SEQUENCES, weights=(1, 1))
MOST_SHARE, MOST_MS = 0.005, 2.0
"""Of a step, whichever is more."""


class Side:
    """One of two models of the same size."""

    def __init__(self, spec: ModelSpec, device: Device, *, is_measured: bool) -> None:
        model = twin.build_ours(spec)
        self.chunks = wrap_chunks([model], config=model.config, adamw=ADAMW)
        self.optimizer = make_optimizer(self.chunks, adamw=ADAMW, precision=Precision(kind="fp32"))
        trainer: Any = SimpleNamespace(
            run=SimpleNamespace(model=spec, layout=Layout()),
            modules=[model],
            optimizer=self.optimizer,
            device=torch.device("cpu"),
            corpus=SimpleNamespace(domains=("a", "b")),
            ledger=SimpleNamespace(last_plan=SimpleNamespace(buckets=BUCKETS)),
            step_state=SimpleNamespace(include=lambda _: None),
            clip=GradientClip(ADAMW),
        )
        self.metrics = StepMetrics(trainer, device=device) if is_measured else None

    def step(self, batches: Any, *, is_read: bool) -> float:
        """Take a step and return its milliseconds."""
        begun = time.perf_counter()
        if self.metrics is not None:
            self.metrics.begin_step(is_logged=is_read)
        result: StepResult = train_step(
            self.chunks, self.optimizer, batches, lr=1e-4, clip_norm=1.0
        )
        if self.metrics is not None:
            self.metrics.count(result, SEGMENT, num_microbatches=1)
            if is_read:
                self.metrics.read(result)
        return (time.perf_counter() - begun) * 1e3


def measure(device: Device, *, repeats: int, interval: int) -> dict[str, Any]:
    """Return median milliseconds of a step, and what the metrics add to it."""
    spec = from_yaml(ModelSpec, (ROOT / "conf/model/axk1_tiny.yaml").read_text("utf-8"))
    bare, measured = (Side(spec, device, is_measured=flag) for flag in (False, True))
    windows = torch.randint(0, spec.vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1))
    domains = torch.arange(NUM_SEQUENCES) % 2
    batches = list(micro_batches(windows, domains, micro_sequences=NUM_SEQUENCES))
    rows: list[tuple[float, float, float]] = []
    for idx in range(repeats + 2):
        kinds = [(bare, False), (measured, False), (measured, True)]
        taken = [0.0] * 3
        for turn in range(3):
            kind = (turn + idx) % 3
            side, is_read = kinds[kind]
            taken[kind] = side.step(batches, is_read=is_read)
        if idx >= 2:  # the first make the moments
            rows.append((taken[0], taken[1] - taken[0], taken[2] - taken[0]))
    step_ms, off_ms, on_ms = (statistics.median(column) for column in zip(*rows, strict=True))
    price_ms = off_ms + (on_ms - off_ms) / interval
    return {
        "step_ms": step_ms,
        "off_ms": off_ms,
        "on_ms": on_ms,
        "interval_steps": interval,
        "price_ms": price_ms,
        "share": price_ms / step_ms,
        "repeats": repeats,
    }


def main() -> int:
    """Measure and print; 1 if it costs more than it may."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=60)
    arguments.add_argument("--interval", type=int, default=10, help="steps between two logged ones")
    asked = arguments.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        device = join_world(store=FileStore(str(Path(folder) / "s"), 1), rank=0, num_ranks=1)
        figures = measure(device, repeats=asked.repeats, interval=asked.interval)
        leave_world()
    print(
        f"a step {figures['step_ms']:.1f} ms; metrics switched off {figures['off_ms']:+.2f} ms,"
        f" switched on and read {figures['on_ms']:+.2f} ms (medians of {asked.repeats} pairs)\n"
        f"read every {asked.interval} steps: {figures['price_ms']:.2f} ms a step,"
        f" {figures['share']:.2%} of it; at most {MOST_SHARE:.1%} or {MOST_MS} ms"
    )
    write_result(asked.json, **figures)
    return 0 if figures["price_ms"] <= max(MOST_MS, MOST_SHARE * figures["step_ms"]) else 1


if __name__ == "__main__":
    sys.exit(main())
