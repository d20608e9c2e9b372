"""Is a stopped rank found, the right one, and within two intervals? Many trials of SIGSTOP.

    python tests/chaos/stop_trials.py --trials 30 --seed 0 --json stops.json

Each trial is a small run whose ranks are forked from one warm process; one of them, drawn, stops
itself in a drawn phase after a drawn time. What was found is read from the run's incidents.jsonl.
Not collected by pytest; `tests/multi/test_watch.py` has one stop of a run started as a user does.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.stream.curriculum import Curriculum, Stage
from parallel.agent import run_ranks
from parallel.beats import Phase, Watch
from parallel.layout import Layout
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.provenance import provenance
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training import job
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.run import AdamW, CheckpointPolicy, Data, Evaluation, Run
from pretrain.training.watching import RunWatch
from tests.chaos.play import descendants
from tests.chaos.quiet import quiet
from tests.conftest import TINY_MODEL
from tests.tiny_corpus import write_corpus

INTERVAL_S = 1.0
PHASES: dict[Phase, float] = {"step": 0.25, "save": 0.4, "evaluation": 0.2, "data": 0.01}
"""Where a rank is stopped, and the longest time after the phase began, in seconds."""
LIMIT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One stop, and what became of it."""

    seed: int
    rank: int
    drawn: str
    phase: str
    """In which the rank really was: a short phase may be over when the signal comes."""
    step: int
    found_s: float | None
    """From the stop to the incident, stacks of the others included; None: not found."""
    named: int | None
    exit_code: int
    num_left: int
    """Processes that still live."""

    @property
    def good(self) -> bool:
        """Whether the right rank was named within two intervals, and the run ended with 85."""
        in_time = self.found_s is not None and self.found_s <= 2 * INTERVAL_S
        return in_time and self.named == self.rank and (self.exit_code, self.num_left) == (85, 0)


def stopping_rank(
    run: Run, rank: int, drawn: Phase, at_step: int, delay_s: float, said: Path
) -> int:
    """Train, and stop this process in a phase if it is the drawn rank; `said` tells when."""
    enter = RunWatch.enter
    is_set = threading.Event()

    def stop(watch: RunWatch) -> None:
        # `said` is in memory: a disk may make this thread wait between the time and the stop
        phase = watch._phase  # pyright: ignore[reportPrivateUsage]  to say where it was stopped
        said.write_text(json.dumps({"time_unix_s": time.time(), "phase": phase}), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGSTOP)

    def enter_and_stop(watch: RunWatch, phase: Phase, step: int) -> None:
        enter(watch, phase, step)
        is_drawn = phase == drawn and step >= at_step and int(os.environ["RANK"]) == rank
        if is_drawn and not is_set.is_set():
            is_set.set()
            threading.Timer(delay_s, stop, [watch]).start()

    setattr(RunWatch, enter.__name__, enter_and_stop)
    return job.train(run, "")


def try_once(seed: int, *, corpus: Path, root: Path, num_ranks: int) -> Trial:
    """Run one trial and return what was found."""
    draw = random.Random(seed)
    rank = draw.randrange(num_ranks)
    drawn = draw.choice(sorted(PHASES))
    at_step, delay_s = draw.randrange(3, 9), draw.uniform(0.0, PHASES[drawn])
    run = small_run(f"t{seed}", corpus=corpus, root=root, num_ranks=num_ranks)
    said = Path("/dev/shm" if os.path.isdir("/dev/shm") else root) / f"stops-{os.getpid()}-{seed}"
    words = (run, rank, drawn, at_step, delay_s, said)
    alarm = threading.Timer(LIMIT_S, _kill_ranks)
    alarm.start()
    with quiet(root / "output.log"):
        target = "tests.chaos.stop_trials:stopping_rank"
        code = run_ranks(target, words, num_ranks=num_ranks)
    alarm.cancel()
    hangs: list[dict[str, Any]] = [i for i in read_incidents(run.folder) if i["kind"] == "hang"]
    stopped = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
    said.unlink(missing_ok=True)
    found_s = hangs[0]["time_unix_s"] - stopped["time_unix_s"] if hangs and stopped else None
    return Trial(
        seed=seed,
        rank=rank,
        drawn=drawn,
        phase=stopped.get("phase", "never"),
        step=at_step,
        found_s=found_s,
        named=hangs[0]["rank"] if len(hangs) == 1 else None,
        exit_code=code,
        num_left=len(descendants(os.getpid())),
    )


def small_run(name: str, *, corpus: Path, root: Path, num_ranks: int) -> Run:
    """Return a run that saves and validates every few steps and does not end by itself."""
    stage = Stage(tokens=100_000 * 8 * 64, window_tokens=64, global_sequences=8)  # without end
    return Run(
        name=name,
        output_root=root,
        seed=1,
        mtp_loss_weight=0.3,
        model=ModelSpec(**TINY_MODEL),  # pyright: ignore[reportArgumentType]  sizes and rates
        layout=Layout(num_ranks=num_ranks, ep=2),
        precision=Precision(kind="fp32"),
        load_balance=LoadBalance(),
        optimizer=AdamW(lr=1e-3),
        lr_schedule=LrSchedule(warmup_tokens=0, decay_tokens=0, final_ratio=1.0),
        curriculum=Curriculum(stages={"only": stage}, max_epochs=1e9),
        micro_batch_tokens=64,
        data=Data(corpus=corpus),
        evaluation=Evaluation(interval_steps=2, windows_per_domain=4, final_windows_per_domain=4),
        checkpoints=CheckpointPolicy(interval_steps=3, keep=1),
        telemetry=TelemetryConfig(wandb="disabled"),
        watch=Watch(interval_s=INTERVAL_S, hang_s=20.0, slow_hang_s=60.0),
    )


def _kill_ranks() -> None:
    for pid in descendants(os.getpid()):
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    """Run the trials, print a line for each, and return 0 if 29 of 30 are good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--ranks", type=int, default=2, help="even")
    parser.add_argument("--json", type=Path, help="where to write the trials")
    words = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    print("  seed  rank  drawn       stopped in  found after       named  exit  left")
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        root = Path(folder)
        corpus = write_corpus(root / "corpus")
        for seed in range(words.seed, words.seed + words.trials):
            trial = try_once(seed, corpus=corpus, root=root, num_ranks=words.ranks)
            trials.append(trial)
            after = "-" if trial.found_s is None else f"{trial.found_s:.2f} s"
            share = "" if trial.found_s is None else f"{trial.found_s / INTERVAL_S:.2f} intervals"
            print(
                f"{trial.seed:6} {trial.rank:5}  {trial.drawn:11} {trial.phase:11}"
                f" {after:>7} {share:>14} {trial.named!s:>4} {trial.exit_code:5} {trial.num_left:5}"
                f"{'' if trial.good else '  BAD'}",
                flush=True,
            )
    times = sorted(trial.found_s for trial in trials if trial.found_s is not None)
    num_good = sum(trial.good for trial in trials)
    num_right = sum(trial.named == trial.rank for trial in trials)
    print(
        f"{num_right} of {len(trials)} named the right rank, {num_good} of {len(trials)} are good"
        f" (right, within two intervals of {INTERVAL_S:g} s, exit code 85, no process left)"
    )
    if times:
        print(
            f"found after {times[0]:.2f} to {times[-1]:.2f} s, median {times[len(times) // 2]:.2f}"
        )
    if words.json:
        record = {
            **provenance(),
            "interval_s": INTERVAL_S,
            "num_right": num_right,
            "num_good": num_good,
            "median_s": times[len(times) // 2] if times else None,
            "longest_s": times[-1] if times else None,
            "trials": [asdict(trial) for trial in trials],
        }
        words.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if num_good >= len(trials) * 29 / 30 - 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
