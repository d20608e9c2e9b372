"""`make chaos`, second part: does a run that is killed at random keep the time that the plan says?

    python tests/chaos/goodput.py [seconds=150] [mtbf=12] [seed=1] [json=PATH]

Two ranks train; one of them, drawn, is killed -9 at times drawn from an exponential distribution
with a mean of `mtbf` seconds. The command starts its ranks again each time. What is left is
compared with what the planner's simulation (pretrain/planner/simulation.py) makes of the same kills
and of what this run measured: seconds of a step, of a blocking save, from a kill to the next step.
"""

import itertools
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.compose import to_yaml
from pretrain.monitor.provenance import provenance
from pretrain.monitor.records import read_attempts as read_records
from pretrain.planner.simulation import Scenario as Plan
from pretrain.planner.simulation import Tier, plain_useful_s
from pretrain.training.restarts import Restarts
from pretrain.training.run import Run
from pretrain.training.start import start
from tests.chaos.play import descendants
from tests.chaos.quiet import quiet
from tests.chaos.scenario import Scenario
from tests.conftest import tiny_curriculum
from tests.tiny_corpus import write_corpus

INTERVAL_STEPS, NUM_RANKS = 10, 2
TARGET = 0.03
"""Largest distance between the run and the simulation, in effective training time."""


class Killer(threading.Thread):
    """Kills ranks at drawn times, from the first step on; stops the run when its time is over."""

    def __init__(self, run: Run, *, mtbf_s: float, seconds: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._metrics = run.folder / "metrics.jsonl"
        self._draw = random.Random(seed)
        self._mtbf_s, self._seconds = mtbf_s, seconds
        self.killed_unix_s: list[float] = []

    def run(self) -> None:
        """Kill and kill again."""
        while not self._metrics.exists():
            time.sleep(0.01)
        end = time.monotonic() + self._seconds
        at = time.monotonic()
        while (at := at + self._draw.expovariate(1 / self._mtbf_s)) < end:
            time.sleep(max(0.0, at - time.monotonic()))
            ranks = sorted(descendants(os.getpid()))
            has_recovered = self._metrics.stat().st_mtime > max(self.killed_unix_s, default=0.0)
            if len(ranks) == NUM_RANKS and has_recovered:  # else it would need its own account
                os.kill(self._draw.choice(ranks), signal.SIGKILL)
                self.killed_unix_s.append(time.time())
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(os.getpid(), signal.SIGTERM)


def account(run: Run, killed_unix_s: list[float]) -> dict[str, Any]:
    """Return the effective training time of a run and what the simulation says of it."""
    records = read_records(run.folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    first, last = steps[0], steps[-1]
    saves = [record for record in records if "checkpoint_save_s" in record]
    step_s, save_s = times_of_steps(steps, saves)
    begun_unix_s = float(first["time_unix_s"]) - step_s
    total_s = float(last["time_unix_s"]) - begun_unix_s
    kills = [at for at in killed_unix_s if at < float(last["time_unix_s"])]
    recoveries = [
        next(float(r["time_unix_s"]) for r in steps if float(r["time_unix_s"]) > at + 0.2)
        - at
        - step_s
        for at in kills
    ]
    persist_s = statistics.median(float(record["checkpoint_save_s"]) for record in saves)
    restart_s = statistics.mean(recoveries)
    plan = Plan(
        mtbf_s=total_s / max(1, len(kills)),
        detection_s=0.0,  # it is in the restart: from the kill to the next step
        shared=Tier(
            interval_s=INTERVAL_STEPS * step_s,
            blocking_s=save_s,
            persist_s=max(persist_s - save_s, 0.0),
            restart_s=restart_s,
        ),
    )
    times = [begun_unix_s, *kills]
    gaps_s = [b - a for a, b in itertools.pairwise(times)] + [2 * total_s]
    predicted_s = plain_useful_s(plan, gaps_s, [True] * len(gaps_s), horizon_s=total_s)
    useful_s = int(last["step"]) * step_s
    return {
        "num_kills": len(kills),
        "total_s": total_s,
        "num_steps": int(last["step"]),
        "step_s": step_s,
        "ettr": useful_s / total_s,
        "simulated_ettr": predicted_s / total_s,
        "measured": {"blocking_s": save_s, "init_s": restart_s},
        "persist_s": persist_s,
        "recoveries_s": recoveries,
    }


def times_of_steps(
    steps: Sequence[Mapping[str, Any]], saves: Sequence[Mapping[str, Any]]
) -> tuple[float, float]:
    """Return the seconds of a step without a save beside it, and those that a save adds.

    Means, not medians: steps that are looked at twice, or written down in full, are steps, too.
    What a save adds is what training waits for it and what the steps beside it take longer.
    """
    busy = [
        (float(save["time_unix_s"]) - float(save["checkpoint_save_s"]), float(save["time_unix_s"]))
        for save in saves
    ]
    alone: list[float] = []
    beside: list[float] = []
    for before, after in itertools.pairwise(steps):
        if before["attempt"] != after["attempt"]:
            continue  # a recovery has its own account
        begin, end = float(before["time_unix_s"]), float(after["time_unix_s"])
        is_beside = any(first < end and last > begin for first, last in busy)
        (beside if is_beside else alone).append(end - begin)
    step_s = statistics.mean(alone)
    return step_s, (sum(beside) - step_s * len(beside)) / len(saves)


def main(arguments: list[str]) -> int:
    """Kill a run for a while and print the account; 0 if it is near the simulation."""
    given = {key: value for key, _, value in (word.partition("=") for word in arguments)}
    allowed = {"seconds", "mtbf", "seed", "json"}
    if given.keys() - allowed:
        print(f"error: {sorted(given.keys() - allowed)} given; {sorted(allowed)} are allowed")
        return 2
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        root = Path(folder)
        run = endless_run(root)
        killer = Killer(
            run,
            mtbf_s=float(given.get("mtbf", 12)),
            seconds=float(given.get("seconds", 150)),
            seed=int(given.get("seed", 1)),
        )
        os.environ["WANDB_MODE"] = "disabled"
        with quiet(root / "output.log"):
            killer.start()
            code = start(run, config_yaml=to_yaml(run))
        found = account(run, killer.killed_unix_s)
    print(
        f"killed {found['num_kills']} times in {found['total_s']:.0f} s, {found['num_steps']} steps"
        f" of {found['step_s'] * 1e3:.0f} ms are left; exit code {code}\n"
        f"  a save costs        {found['measured']['blocking_s'] * 1e3:8.1f} ms\n"
        f"  a save is committed {found['persist_s'] * 1e3:8.1f} ms after its begin\n"
        f"  kill to next step   {found['measured']['init_s']:8.2f} s\n"
        f"effective training time {found['ettr']:.3f}, simulated {found['simulated_ettr']:.3f}"
    )
    if "json" in given:
        record = {**provenance(), **found, "target": TARGET}
        Path(given["json"]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if abs(found["ettr"] - found["simulated_ettr"]) <= TARGET and code == 75 else 1


def endless_run(root: Path) -> Run:
    """Return a run that does not end by itself."""
    run = Scenario(layout="ep2").run(
        root / "runs", corpus=write_corpus(root / "corpus"), name="run"
    )
    return replace(
        run,
        curriculum=replace(tiny_curriculum(100_000 * 4 * 64, sequences=4), max_epochs=1e9),
        checkpoints=replace(run.checkpoints, interval_steps=INTERVAL_STEPS),
        evaluation=replace(run.evaluation, interval_steps=0),
        restarts=Restarts(in_job=1_000_000, without_progress=1_000_000),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
