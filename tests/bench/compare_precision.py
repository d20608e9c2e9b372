"""Does FP8 train as BF16 does, and what are E5M2 gradients for? The demo, thrice, one seed.

    python tests/bench/compare_precision.py [--json FILE] [--plot FILE.png] [--steps N]

bf16, fp8_hybrid_emulated and fp8_e4m3_emulated (gradients in E4M3, too), each
`launch/pretrain.py` with the same weights and text at first. Takes about half an hour on two cores;
`launch/prepare.py` must have run (`make run` does it).
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.records import read_metrics
from tests.bench.provenance import parser, write_result

PRECISIONS = ("bf16", "fp8_hybrid_emulated", "fp8_e4m3_emulated")
STEP_TOKENS = 2048
OPERANDS = ("input", "weight", "gradient")
LAST = 20
"""Steps that the last loss is a mean of."""


def train(root: Path, precision: str, *, num_steps: int, more: Sequence[str]) -> dict[str, Any]:
    """Train one side and return its curves and what became of values in FP8."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        f"precision={precision}",
        "curriculum=plain",
        f"curriculum.stages.all.tokens={num_steps * STEP_TOKENS}",
        f"lr_schedule.warmup_tokens={num_steps // 30 * STEP_TOKENS}",
        "lr_schedule.decay_tokens=0",
        "evaluation.interval_steps=0",
        "checkpoints.interval_steps=0",
        f"output_root={root}",
        f"name={precision}",
        "telemetry.wandb=disabled",
        *more,
    ]
    if precision != "bf16":
        command.append(f"precision.shadow_interval_steps={max(1, num_steps // 10)}")
    subprocess.run(command, cwd=ROOT, check=True)
    records = list(read_metrics(root / precision / "metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    losses = [float(record["loss"]) for record in steps]
    shadows = [float(r["shadow_gradient_error"]) for r in steps if "shadow_gradient_error" in r]
    (score,) = [float(r["validation/loss"]) for r in records if "validation/loss" in r][-1:]
    return {
        "precision": precision,
        "losses": [round(loss, 4) for loss in losses],
        "last_loss": statistics.fmean(losses[-LAST:]),
        "validation_loss": score,
        "step_s": statistics.median(float(r["step_time_s"]) for r in steps if "step_time_s" in r),
        "gradient_error": statistics.fmean(shadows) if shadows else None,
        **{
            f"{operand}_{what}": _mean_of(steps, f"fp8_{operand}_{what}")
            for operand in OPERANDS
            for what in ("underflow", "overflow", "sqnr_db")
        },
    }


def _mean_of(records: Sequence[Any], name: str) -> float | None:
    values = [float(record[name]) for record in records if name in record]
    return statistics.fmean(values) if values else None


def draw(sides: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses, and how far FP8's are from BF16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), dpi=110)
    for side, colour in zip(sides, ("#000000", "#0072b2", "#d55e00"), strict=True):
        steps = range(1, len(side["losses"]) + 1)
        upper.plot(steps, side["losses"], color=colour, linewidth=1, label=side["precision"])
        gap = [a - b for a, b in zip(side["losses"], sides[0]["losses"], strict=True)]
        lower.plot(steps, gap, color=colour, linewidth=1)
    upper.set_ylabel("loss, nats/token")
    lower.set_ylabel("loss less bf16's")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Train all and print them side by side."""
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("more", nargs="*", help="words for launch/pretrain.py, as data.corpus=")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="precision-") as folder:
        sides = [
            train(Path(folder), precision, num_steps=asked.steps, more=asked.more)
            for precision in PRECISIONS
        ]
    print("\n" + " " * 20 + "".join(f"{side['precision']:>22}" for side in sides))
    for name in sides[0]:
        if name not in ("precision", "losses"):
            values = [side[name] for side in sides]
            shown = ["-" if value is None else f"{value:.4g}" for value in values]
            print(f"{name:20}" + "".join(f"{text:>22}" for text in shown))
    if asked.plot:
        draw(sides, asked.plot)
    write_result(asked.json, num_steps=asked.steps, sides=sides)


if __name__ == "__main__":
    main()
