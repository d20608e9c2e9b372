"""What is the second RMSNorm of a MoE block for? Two runs of one seed, with and without it.

    python tests/bench/ablate_dual_norm.py [--json FILE] [--plot FILE.png] [--lr RATE] [--steps N]

Both are `launch/pretrain.py +experiment=dual_norm`: the demo at a learning rate that provokes
it, watched by the run's own detector, which does nothing about what it sees. Takes about five
minutes on two cores; `launch/prepare.py` must have run (`make run` does it).
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.records import read_metrics
from tests.bench.provenance import parser, write_result

_LAST = 20
"""Steps that the last loss is a mean of."""
_FAR = 14.0
"""conf/recovery/rule: what is flagged alone."""


def train(root: Path, *, dual_norm: bool, lr: float, num_steps: int) -> dict[str, Any]:
    """Train one side and return its curves and what the watch saw."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        "+experiment=dual_norm",
        f"model.dual_norm={str(dual_norm).lower()}",
        f"optimizer.lr={lr}",
        f"curriculum.stages.all.tokens={num_steps * 2048}",
        f"output_root={root}",
        f"name={'with' if dual_norm else 'without'}",
        "telemetry.wandb=disabled",
    ]
    done = subprocess.run(command, cwd=ROOT)
    folder = root / ("with" if dual_norm else "without")
    steps = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    losses = [float(record["loss"]) for record in steps]
    scores = [float(record["spike_z"]) for record in steps if "spike_z" in record]
    logits = [float(r["attention_logit_max"]) for r in steps if "attention_logit_max" in r]
    residual = [float(r["residual_abs_max"]) for r in steps if "residual_abs_max" in r]
    return {
        "dual_norm": dual_norm,
        "exit_code": done.returncode,
        "losses": [round(loss, 4) for loss in losses],
        "gradient_norms": [round(float(record["gradient_norm"]), 4) for record in steps],
        "last_loss": statistics.fmean(losses[-_LAST:]),
        "largest_gradient_norm": max(float(record["gradient_norm"]) for record in steps[20:]),
        "num_flagged": sum(score > _FAR for score in scores),
        "num_spikes": sum(i["kind"] == "loss_spike" for i in read_incidents(folder)),
        "largest_attention_logit": max(logits),
        "largest_residual": max(residual),
    }


def draw(sides: list[dict[str, Any]], path: Path) -> None:
    """Draw both losses and gradient norms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), dpi=110)
    for side, colour in zip(sides, ("#0072b2", "#d55e00"), strict=True):
        label = f"{'with' if side['dual_norm'] else 'without'} the second norm"
        steps = range(1, len(side["losses"]) + 1)
        upper.plot(steps, side["losses"], color=colour, linewidth=1, label=label)
        lower.plot(steps, side["gradient_norms"], color=colour, linewidth=1)
    upper.set_ylabel("loss, nats/token")
    lower.set_ylabel("gradient norm")
    lower.set_yscale("log")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Train both and print them side by side."""
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments.add_argument("--lr", type=float, default=0.03)
    arguments.add_argument("--steps", type=int, default=400)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="dual-norm-") as folder:
        sides = [
            train(Path(folder), dual_norm=dual_norm, lr=asked.lr, num_steps=asked.steps)
            for dual_norm in (True, False)
        ]
    print(f"\n{'':24}{'with':>12}{'without':>12}")
    for name in sides[0]:
        if name not in ("dual_norm", "losses", "gradient_norms"):
            print(f"{name:24}" + "".join(f"{side[name]:12.4g}" for side in sides))
    if asked.plot:
        draw(sides, asked.plot)
    write_result(asked.json, lr=asked.lr, num_steps=asked.steps, sides=sides)


if __name__ == "__main__":
    main()
