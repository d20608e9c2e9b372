"""Curves with planted spikes, and what two published rules find in them.

python tests/pretrain/monitor/published_rules.py --seeds 20 --json docs/figures/loss_spikes.json
"""

import argparse
import json
import math
import secrets
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import numpy.typing as npt

from pretrain.monitor.loss_spikes import LossSpikes, SpikeRule
from pretrain.monitor.provenance import provenance

Values = npt.NDArray[np.float64]
Noise = Literal["normal", "t5"]
NOISE_NATS = 0.02
NUM_STEPS = 20_000
SPIKES = ((2, 8.0), (60, 10.0), (5, 12.0), (1, 25.0), (10, 40.0), (3, 80.0))
"""Length in steps and height in robust deviations of the noise; one step alone must stand out more
than chance does."""
_ROBUST = {"normal": 1.0, "t5": 1.4826 * 0.7267}  # 0.7267: third quartile of t with 5 degrees


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A loss of a run."""

    loss: Values
    """`[steps]` nats per token."""
    spikes: tuple[range, ...]
    """Steps that were planted."""


def clean_curve(seed: int, *, noise: Noise, num_steps: int = NUM_STEPS) -> Curve:
    """Return a loss that falls fast, then slowly, and nothing else but noise."""
    draw = np.random.default_rng(seed)
    trend = 2.0 + 9.0 * (1 + np.arange(num_steps) / 40) ** -0.6
    drawn = draw.normal(size=num_steps) if noise == "normal" else draw.standard_t(5, num_steps)
    return Curve(loss=trend + NOISE_NATS * drawn, spikes=())


def spiked_curve(seed: int, *, noise: Noise, num_steps: int = NUM_STEPS) -> Curve:
    """Return the same with all of SPIKES, at places that are drawn, far from one another."""
    loss = clean_curve(seed, noise=noise, num_steps=num_steps).loss
    draw = np.random.default_rng(seed + 1)
    places = num_steps // 400
    starts = 400 * draw.choice(np.arange(2, places), len(SPIKES), replace=False)
    starts += draw.integers(0, 200, len(SPIKES))
    planted: list[range] = []
    for start, (length, height) in zip(starts.tolist(), SPIKES, strict=True):
        loss[start : start + length] += height * _ROBUST[noise] * NOISE_NATS
        planted.append(range(start, start + length))
    return Curve(loss=loss, spikes=tuple(planted))


def ours(loss: Sequence[float]) -> list[bool]:
    """Return which steps our rule flags or holds as a spike."""
    spikes = LossSpikes(SpikeRule())
    found: list[bool] = []
    for step, value in enumerate(loss):
        seen = spikes.observe({"loss": value}, step=step)
        found.append(seen.is_flagged or (seen.state == "spike" and seen.worst > 3))
    return found


def olmo(loss: Sequence[float]) -> list[bool]:
    """Return which steps OLMo-core's SkipStep optimizers skip: 6 sigma of the last 128.

    Source: OLMo-core, optim/skip_step_optimizer.py: from half a window on, deviation with
        Bessel's correction, every value enters the window.
    """
    window: deque[float] = deque(maxlen=128)
    found: list[bool] = []
    for value in loss:
        if len(window) < 64:
            found.append(False)
        else:
            limit = statistics.fmean(window) + 6 * statistics.stdev(window)
            found.append(not value <= limit)
        window.append(value)
    return found


def megatron(loss: Sequence[float]) -> list[bool]:
    """Return which steps megatron-core 0.16.1 finds unexpectedly large.

    Source: core/rerun_state_machine.py, is_unexpectedly_large with threshold 10, num_samples 100.
    """
    most = -math.inf
    found: list[bool] = []
    for step, value in enumerate(loss):
        if step < 100:
            most = max(most, value)
            found.append(False)
        else:
            found.append(value >= 10 * most)
    return found


RULES: dict[str, Callable[[Sequence[float]], list[bool]]] = {
    "ours": ours,
    "OLMo-core, 6 sigma of 128": olmo,
    "megatron-core, 10 times the first 100": megatron,
}


def found_and_held(flags: Sequence[bool], curve: Curve) -> tuple[int, float]:
    """Return how many spikes were found within one step, and the share of the longest held."""
    found = sum(any(flags[s.start : s.start + 2]) for s in curve.spikes)
    longest = max(curve.spikes, key=len)
    return found, sum(flags[longest.start : longest.stop]) / len(longest)


def measure(seeds: Sequence[int], *, num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """Return a row of figures for each rule: worst and mean over seeds."""
    rows: list[dict[str, Any]] = []
    for name, rule in RULES.items():
        found: list[int] = []
        held: list[float] = []
        false: dict[Noise, list[int]] = {"normal": [], "t5": []}
        for seed in seeds:
            curve = spiked_curve(seed, noise="normal", num_steps=num_steps)
            num, share = found_and_held(rule(curve.loss.tolist()), curve)
            found.append(num)
            held.append(share)
            for noise, counts in false.items():
                clean = clean_curve(seed, noise=noise, num_steps=num_steps)
                counts.append(sum(rule(clean.loss.tolist())))
        rows.append(
            {
                "rule": name,
                "found": sum(found),
                "planted": len(SPIKES) * len(seeds),
                "held_least": min(held),
                "held_mean": statistics.fmean(held),
                **{f"false_{noise}_most": max(counts) for noise, counts in false.items()},
                **{f"false_{noise}_mean": statistics.fmean(c) for noise, c in false.items()},
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write JSON where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many, drawn anew")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    seeds = [secrets.randbelow(2**31) for _ in range(given.seeds)]
    rows = measure(seeds)
    for row in rows:
        print(
            f"{row['rule']:<40} found {row['found']}/{row['planted']}, held >= "
            f"{row['held_least']:.2f} (mean {row['held_mean']:.2f}), flagged of clean steps <= "
            f"{row['false_normal_most']} (normal), {row['false_t5_most']} (t5)"
        )
    if given.json is not None:
        record = {**provenance(), "seeds": seeds, "num_steps": NUM_STEPS, "rows": rows}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
