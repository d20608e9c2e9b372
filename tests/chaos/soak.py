"""`make chaos`: faults drawn at random strike runs of several layouts; every oracle must be silent.

    python tests/chaos/soak.py faults=200 seed=1 [layouts=ep2,pp2] [json=PATH]

Each run gets a few faults from its own seed, which is printed, so that one run can be played
again: `python tests/chaos/soak.py only=17`. Between two starts the newest checkpoint may be
damaged. A share of the runs has checkpoints on the node's own disk, too; there it is those of one
rank that are damaged or taken away. Ends with 1 if any oracle was violated.
"""

import json
import logging
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.provenance import provenance
from pretrain.training.run import Run
from tests.chaos.faults import Planted, damage, draw_faults, wrong_incidents
from tests.chaos.oracles import Truth, lost_work, truth_of, violations
from tests.chaos.play import Environment, play
from tests.chaos.quiet import quiet
from tests.chaos.scenario import LAYOUTS, NUM_STEPS, Scenario
from tests.tiny_corpus import write_corpus

_FAULTS_PER_RUN = (2, 6)
_DAMAGE_SHARE = 0.3
_LOCAL_SHARE = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run."""

    seed: int
    layout: str
    faults: tuple[str, ...]
    """Those that struck."""
    damage: tuple[str, ...]
    codes: tuple[int, ...]
    seconds: float
    violations: tuple[str, ...]

    @property
    def num_faults(self) -> int:
        """Faults that struck, damage included."""
        return len(self.faults) + len(self.damage)


class Soak:
    """Plays runs of one corpus, and what each is compared with."""

    def __init__(self, folder: Path) -> None:
        """Prepare the corpus.

        Args:
            folder: empty; everything is written there.
        """
        self._folder = folder
        self._corpus = write_corpus(folder / "corpus")
        self._truths: dict[str, Truth] = {}
        (folder / "temporary").mkdir()
        self._environment: Environment | None = None

    def play_one(self, seed: int, *, layouts: list[str]) -> Row:
        """Disturb one run and compare it with the truth of its layout."""
        draw = random.Random(seed)
        layout = draw.choice(layouts)
        truth = self._truth(layout)
        in_job = draw.choice((0, 0, 2))
        node = self._folder / f"node_{seed}" if draw.random() < _LOCAL_SHARE else None
        scenario = Scenario(layout=layout, in_job=in_job, without_progress=99, local=node)
        run = scenario.run(self._folder / "runs", corpus=self._corpus, name=f"soak_{seed}")
        planted = draw_faults(
            draw,
            num_faults=draw.randrange(*_FAULTS_PER_RUN),
            num_ranks=run.layout.num_ranks,
            num_steps=NUM_STEPS,
            has_local=node is not None,
        )
        damaged: list[str] = []

        def between(run: Run, _: int) -> None:
            if node is not None:
                if draw.random() < _DAMAGE_SHARE:
                    damaged.extend(harm_one_rank(node, draw))
                return
            folders = list_checkpoints(run.folder / "checkpoints")
            if len(folders) > 1 and draw.random() < _DAMAGE_SHARE:
                damaged.append(f"{folders[-1].name}: {damage(folders[-1], draw)}")

        with quiet(self._folder / "output.log"):
            played = play(
                run, [f.text for f in planted], between=between, environment=self._environment
            )
        if self._environment is None:  # the process that ranks are forked from is there now
            self._environment = Environment(self._folder / "temporary")
        struck = [fault for fault in planted if _has_struck(fault, played.struck)]
        kinds = Counter(str(record["kind"]) for record in read_incidents(run.folder))
        found = violations(played, truth)
        if not damaged:
            found += lost_work(played, is_harmed=False)
        if node is not None:
            found += [f"leftovers: {path}" for path in sorted(node.glob("*"))]
        found += wrong_incidents(
            kinds,
            codes=[attempt.code for attempt in read_attempts(run.folder)],
            planted=struck,
            num_damaged=0 if node is not None else len(damaged),
            num_local=len(damaged) if node is not None else 0,
        )
        return Row(
            seed=seed,
            layout=layout if node is None else f"{layout} local",
            faults=tuple(fault.text for fault in struck),
            damage=tuple(damaged),
            codes=played.codes,
            seconds=played.seconds,
            violations=tuple(found),
        )

    def _truth(self, layout: str) -> Truth:
        if layout not in self._truths:
            name = f"whole_{layout.replace(' ', '_')}"
            run = Scenario(layout=layout).run(self._folder / "runs", corpus=self._corpus, name=name)
            with quiet(self._folder / "output.log"):
                played = play(run)
            self._truths[layout] = truth_of(run)
            wrong = violations(played, self._truths[layout], codes=[0], incidents=Counter())
            if wrong:
                raise RuntimeError(f"the undisturbed run of {layout} is wrong: {wrong}")
        return self._truths[layout]


def harm_one_rank(node: Path, draw: random.Random) -> list[str]:
    """Damage the newest checkpoint of one rank on its disk, or take all away; say what was done."""
    ranks = sorted(node.glob("*/*/*/rank_*"))
    if not ranks:
        return []
    own = draw.choice(ranks)
    folders = list_checkpoints(own)
    if not folders or draw.random() < 0.5:
        shutil.rmtree(own)
        return [f"removed {own.name} from its disk"]
    return [f"{own.name}: {folders[-1].name}: {damage(folders[-1], draw)}"]


def _has_struck(fault: Planted, marks: frozenset[str]) -> bool:
    point, action, *words = fault.text.split(":")
    options = dict(word.split("=") for word in words)
    wanted = (point, action.partition("=")[0], options.get("rank"), options.get("step"))
    return any(mark.startswith("-".join(map(str, wanted)) + "-") for mark in marks)


def main(arguments: list[str]) -> int:
    """Play runs until enough faults have struck; print a line for each."""
    given = {key: value for key, _, value in (word.partition("=") for word in arguments)}
    unknown = given.keys() - {"faults", "seed", "layouts", "only", "json", "keep"}
    if unknown:
        print(
            f"error: {sorted(unknown)} given; faults, seed, layouts, only, json, keep are allowed"
        )
        return 2
    layouts = given.get("layouts", ",".join(LAYOUTS)).split(",")
    wanted, seed = int(given.get("faults", 200)), int(given.get("seed", 1))
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        soak = Soak(Path(folder))
        print(f"{'seed':>6}  {'layout':14} {'faults':>6}  {'time':>6}  {'left':>7}  codes")
        while sum(row.num_faults for row in rows) < (1 if "only" in given else wanted):
            row = soak.play_one(int(given.get("only", seed + len(rows))), layouts=layouts)
            rows.append(row)
            _print_row(row, rows, wanted=wanted, elapsed_s=time.monotonic() - started)
    return _finish(rows, elapsed_s=time.monotonic() - started, path=given.get("json"))


def _print_row(row: Row, rows: list[Row], *, wanted: int, elapsed_s: float) -> None:
    done = sum(row.num_faults for row in rows)
    left_s = elapsed_s / max(1, done) * max(0, wanted - done)
    print(
        f"{row.seed:6}  {row.layout:14} {row.num_faults:6}  {row.seconds:5.1f}s"
        f"  {left_s / 60:5.1f}min"
        f"  {' '.join(map(str, row.codes))}",
        flush=True,
    )
    if row.violations:
        print(f"        faults: {'; '.join((*row.faults, *row.damage))}")
        for line in row.violations:
            print(f"        VIOLATED {line}", flush=True)


def _finish(rows: list[Row], *, elapsed_s: float, path: str | None) -> int:
    num_faults = sum(row.num_faults for row in rows)
    violated = [row for row in rows if row.violations]
    print(
        f"\n{num_faults} faults in {len(rows)} runs, {elapsed_s / 60:.1f} minutes:"
        f" {len(violated)} runs with a violated oracle"
    )
    by_kind = Counter(text.split(":")[1] for row in rows for text in row.faults)
    by_kind["damaged checkpoint"] = sum(len(row.damage) for row in rows)
    for kind, count in by_kind.most_common():
        print(f"  {kind:20} {count:4}")
    if path:
        record = {
            **provenance(),
            "num_faults": num_faults,
            "num_runs": len(rows),
            "minutes": elapsed_s / 60,
            "num_violated": len(violated),
            "by_kind": dict(by_kind),
            "by_layout": dict(Counter(row.layout for row in rows)),
            "median_run_s": statistics.median(row.seconds for row in rows),
            "rows": [asdict(row) for row in rows],
        }
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if violated:
        print(f"play one again: python tests/chaos/soak.py only={violated[0].seed}")
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
