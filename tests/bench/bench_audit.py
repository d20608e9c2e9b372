"""What does it cost to ask at every step whether the state changed by itself?

    python tests/bench/bench_audit.py [--json FILE] [--repeats N]

One rank trains the demo's model (conf/model/axk1_tiny.yaml) on 1,024 tokens a step, as each of the
demo's two ranks does. Each repeat takes a step, and then what pretrain/training/state_audit.py does
beside it: the digests after the update, and those and the comparison before the next one. Both are
times of the same run, taken in turn, so that a disturbance of the machine meets both.
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

from launch.compose import from_yaml
from parallel.groups import join_world, leave_world
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import AdamW
from pretrain.training.state_audit import StateAudit
from pretrain.training.train_step import StepResult, micro_batches, train_step
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving import twin

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 256
ADAMW = AdamW(lr=1e-4)
UNUSED = StepResult(loss=1.0, gradient_norm=1.0, lr=1e-4)


def measure(repeats: int) -> dict[str, Any]:
    """Return median milliseconds of a step, of both looks at the state, and their ratio."""
    spec = from_yaml(ModelSpec, (ROOT / "conf/model/axk1_tiny.yaml").read_text("utf-8"))
    model = twin.build_ours(spec)
    chunks = wrap_chunks([model], config=model.config, adamw=ADAMW)
    optimizer = make_optimizer(chunks, adamw=ADAMW, precision=Precision(kind="fp32"))
    windows = torch.randint(0, spec.vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1))
    domains = torch.zeros(NUM_SEQUENCES, dtype=torch.int64)
    batches = list(micro_batches(windows, domains, micro_sequences=NUM_SEQUENCES))
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(recheck=Recheck(), optimizer=ADAMW, precision=Precision(kind="fp32")),
        chunks=chunks,
        optimizer=optimizer,
        device=torch.device("cpu"),
        position=SimpleNamespace(step=0),
    )
    steps, looks = list[float](), list[float]()
    train_step(chunks, optimizer, batches, lr=1e-4, clip_norm=1.0)
    audit = StateAudit(trainer, record=lambda _: None, enter=lambda _phase, _step: None)
    for _ in range(repeats):
        begun = time.perf_counter()
        train_step(chunks, optimizer, batches, lr=1e-4, clip_norm=1.0)
        stepped = time.perf_counter()
        audit.after_update()
        audit(batches, UNUSED)
        steps.append(stepped - begun)
        looks.append(time.perf_counter() - stepped)
    return {
        "num_parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        "step_ms": statistics.median(steps) * 1e3,
        "audit_ms": statistics.median(looks) * 1e3,
        "ratio": statistics.median(a / b for a, b in zip(looks, steps, strict=True)),
        "repeats": repeats,
    }


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=60)
    asked = arguments.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        join_world(store=FileStore(str(Path(folder) / "store"), 1), rank=0, num_ranks=1)
        figures = measure(asked.repeats)
        leave_world()
    print(
        f"{figures['num_parameters']:,} parameters: a step {figures['step_ms']:.1f} ms, both looks"
        f" at the state {figures['audit_ms']:.2f} ms, {figures['ratio']:.2%} of it (median of"
        f" {figures['repeats']} pairs)"
    )
    write_result(asked.json, **figures)


if __name__ == "__main__":
    main()
