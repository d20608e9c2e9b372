"""Does a real SLURM train one run through a chain of jobs, whatever happens to them?

    python tests/slurm/slurm_check.py [--json FILE] [--only WORD]

Installs slurm-wlm, munge and shellcheck where they are missing (as root), starts a SLURM of its own
on this machine, and submits small runs to it with launch/submit.py. The shortest time limit that
SLURM knows is a minute, so a chain of three takes some. Exit code 1 if anything differs.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.provenance import provenance
from tests.data.indexed.pairs import random_documents, write_pair
from tests.slurm.chains import (
    MODEL,
    STEP_TOKENS,
    Chain,
    cluster,
    differing,
    losses,
    make_corpus,
    ranks_of,
    run_command,
)
from tests.slurm.local_slurm import (
    PHANTOM,
    SlurmError,
    command,
    ensure_installed,
    jobs,
    local_slurm,
    wait_until,
)

TRAINING_S = 50.0  # of the reference, steps alone: more than two segments of a minute hold
SHORT_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one check expected and found."""

    check: str
    expected: str
    found: str
    holds: bool
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the checks work, and what they compare with."""

    root: Path
    corpus: Path
    steps: int
    reference: dict[int, set[str]]

    def chain(self, name: str, *, limit_s: int = 600, steps: int = 0, **changes: str) -> Chain:
        """Return a run that is not submitted yet; 0 steps: as many as the reference."""
        words = [*training(self.corpus, steps=steps or self.steps), cluster(time_limit_s=limit_s)]
        words += [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return Chain(root=self.root, name=name, words=tuple(words))


def training(corpus: Path, *, steps: int) -> list[str]:
    """Return the words of a run of so many steps."""
    tokens = f"curriculum.stages.all.tokens={steps * STEP_TOKENS}"
    return [*MODEL, f"data.corpus={corpus}", tokens]


def make_place(root: Path) -> Place:
    """Train the reference without SLURM, as long as this machine needs for TRAINING_S."""
    corpus = root / "corpus"
    make_corpus(corpus)
    launch = ["launch/pretrain.py", f"output_root={root}"]
    run_command(*launch, *training(corpus, steps=SHORT_STEPS), "name=trial")
    records = (root / "trial" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = [
        record["step_time_s"] for record in map(json.loads, records) if "step_time_s" in record
    ]
    steps = max(100, round(TRAINING_S / times[-1]))
    run_command(*launch, *training(corpus, steps=steps), "name=reference")
    return Place(root=root, corpus=corpus, steps=steps, reference=losses(root / "reference"))


def check_chain(place: Place) -> Row:
    """(i) Segments of a minute: each saves in time and the next goes on, to the last token."""
    chain = place.chain("chain", limit_s=60)
    array = chain.submit("slurm.segments=12")
    wait_until(lambda: 0 in chain.codes(array), seconds=540, what="the chain ends with 0")
    wait_until(lambda: not chain.waiting(), seconds=30, what="nothing of the chain is queued")
    codes, found = chain.codes(array), losses(chain.folder)
    other = differing(found, place.reference)
    warned = sum("USR1" in chain.said(array, element) for element in range(len(codes)))
    holds = codes == [75] * (len(codes) - 1) + [0] and len(codes) >= 3 and not other
    return Row(
        check="a chain of segments of one minute",
        expected=f"3 or more elements: 75, 75, ..., 0; {place.steps} losses as without SLURM",
        found=f"{codes}, {warned} warned by USR1; {len(found)} losses, {len(other)} differ; "
        f"{chain.waiting()} left in the queue",
        holds=holds and len(found) == place.steps,
    )


def check_signals(place: Place) -> Row:
    """(ii) scancel, with TERM and without a word: saved, and the next element goes on."""
    chain = place.chain("signals")
    array = chain.submit("slurm.segments=6", "slurm.faults.max_excluded_share=1.0")
    chain.wait_for_steps(10)
    (chain.folder / "incidents.jsonl").write_text(incidents(PHANTOM, 2), encoding="utf-8")
    # it signals, tries again because the element is ending, and calls that an error
    command("scancel", "--signal=TERM", f"{array}_0", check=False)
    first = chain.wait_for_code(array, 0, seconds=60)
    saved = chain.saved_step(array, 0)
    chain.wait_for_steps(saved + 10)
    excluded = PHANTOM in command("scontrol", "show", "job", f"{array}_1")
    command("scancel", f"{array}_1")
    second = chain.wait_for_code(array, 1, seconds=60)
    saved_again = chain.saved_step(array, 1)
    chain.wait_for_steps(saved_again + 5)
    command("scancel", array)
    wait_until(lambda: not chain.waiting(), seconds=60, what="the chain is gone")
    other = differing(losses(chain.folder), place.reference)
    return Row(
        check="scancel --signal=TERM, then scancel, of a running element",
        expected="75 and 75, the next goes on with the step after, same losses; next one leaves "
        f"{PHANTOM} out",
        found=f"{first} at step {saved}, {second} at step {saved_again}; "
        f"{len(other)} losses differ; left out: {excluded}",
        holds=(first, second) == (75, 75) and saved_again > saved > 0 and not other and excluded,
    )


def check_killed_rank(place: Place) -> Row:
    """(iii) kill -9 of a rank: torchrun starts the ranks again inside the job."""
    chain = place.chain("killed")
    array = chain.submit("slurm.segments=4")
    chain.wait_for_steps(45)  # a checkpoint stands at 40
    before = ranks_of("killed")
    os.kill(before[1], signal.SIGKILL)
    at = max(losses(chain.folder))
    wait_until(lambda: max(losses(chain.folder)) > at + 20, seconds=150, what="the run goes on")
    after, same_element = ranks_of("killed"), chain.code(array, 0) is None
    command("scancel", array)
    wait_until(lambda: not chain.waiting(), seconds=60, what="the chain is gone")
    other = differing(losses(chain.folder), place.reference)
    new = set(after.values()).isdisjoint(before.values()) and set(after) == {0, 1}
    return Row(
        check="kill -9 of a rank inside an element",
        expected="two new ranks go on in the same element, same losses",
        found=f"{'two new ranks' if new else after}, same element: {same_element}; "
        f"{len(other)} losses differ",
        holds=new and same_element and not other,
    )


def check_wrong(place: Place) -> Row:
    """(iv) What only a person can mend ends the chain."""
    chain = place.chain("wrong", data__corpus=str(place.root / "nowhere"))
    array = chain.submit("slurm.segments=5")
    code = chain.wait_for_code(array, 0, seconds=90)
    wait_until(lambda: not chain.waiting(), seconds=30, what="nothing of the chain is queued")
    return Row(
        check="a corpus that is not there",
        expected="2, and nothing left in the queue",
        found=f"{code} in {len(chain.codes(array))} element, {chain.waiting()} left in the queue",
        holds=code == 2 and chain.codes(array) == [2],
    )


def check_singleton(place: Place) -> Row:
    """(v) Two chains of one run never train at once; the second takes over from the first."""
    chain = place.chain("twice", steps=4 * SHORT_STEPS)
    first, second = chain.submit("slurm.segments=3"), chain.submit("slurm.segments=3")
    chain.wait_for_steps(5)
    states = jobs("--name", next((chain.folder / "slurm").glob("*.out")).name.split("_")[0])
    running = [job for job, state in states.items() if state != "PENDING"]
    command("scancel", first)
    code = chain.wait_for_code(second, 0, seconds=150)
    wait_until(lambda: not chain.waiting(), seconds=60, what="nothing of the chains is queued")
    return Row(
        check="two chains of one run",
        expected=f"only {first}_0 of 6 elements runs; the second chain ends with 0",
        found=f"{', '.join(running)} of {len(states)} ran; {code}",
        holds=running == [f"{first}_0"] and len(states) == 6 and code == 0,
    )


def check_nodes(place: Place) -> Row:
    """(vi) A node that fails too often is left out of the next submission."""
    chain = place.chain("nodes", steps=SHORT_STEPS)
    for name, number in ((PHANTOM, 2), ("elsewhere", 5), ("phantom2", 1)):
        folder = place.root / f"past_{name}"
        folder.mkdir(exist_ok=True)
        (folder / "incidents.jsonl").write_text(incidents(name, number), encoding="utf-8")
    array = chain.submit("slurm.segments=2", "slurm.faults.max_excluded_share=1.0")
    shown = command("scontrol", "show", "job", array)
    found = {line.split("ExcNodeList=")[1].split()[0] for line in shown.splitlines()
             if "ExcNodeList=" in line}  # fmt: skip
    command("scancel", array)
    wait_until(lambda: not jobs(), seconds=60, what="the queue is empty")
    return Row(
        check="a node with two events, one with one, one that SLURM does not have",
        expected=PHANTOM,
        found=", ".join(sorted(found)),
        holds=found == {PHANTOM},
    )


def check_sweep(place: Place) -> Row:
    """(vii) Two proxies, each a run of its own."""
    sweep = place.chain("sweep", steps=SHORT_STEPS, optimizer__lr="1e-3,2e-3")
    sweep.submit("job=sweep", "slurm.limit=1")
    folders = [sweep.folder / "optimizer.lr=0.001", sweep.folder / "optimizer.lr=0.002"]
    wait_until(
        lambda: all((folder / "exit.json").exists() for folder in folders) and not jobs(),
        seconds=150,
        what="both runs end",
    )
    codes = [json.loads((folder / "exit.json").read_text())["code"] for folder in folders]
    ends = [losses(folder)[SHORT_STEPS] for folder in folders]
    return Row(
        check="a sweep of two learning rates",
        expected="0 and 0, two last losses",
        found=f"{codes}, {len(set.union(*ends))} last losses",
        holds=codes == [0, 0] and ends[0] != ends[1],
    )


def check_tasks(place: Place) -> Row:
    """(viii) Two parts of an index, then the manifest over both."""
    pairs, output = place.root / "pairs", place.root / "index"
    for number in range(4):
        write_pair(pairs / f"p{number}", random_documents(40, vocab_size=500, seed=number))
    line = (
        f"launch/index_data.py '+pairs.web.prefixes=[{pairs}/*]' output={output} workers=1"
        f" tokenizer={place.corpus}/tokenizer.json window_tokens=[7]"
    )
    listing = place.root / "tasks.txt"
    listing.write_text(f"{line} part=1/2\n{line} part=2/2\nthen {line}\n", encoding="utf-8")
    chain = Chain(root=place.root, name="tasks", words=())
    chain.submit("job=prepare", f"tasks={listing}", "slurm.time_limit_s=120", "slurm.limit=1",
                 "slurm.cpus_per_task=1")  # fmt: skip
    wait_until(lambda: not jobs(), seconds=120, what="the tasks end")
    last = "".join(path.read_text() for path in (chain.folder / "slurm").glob("*-then_*.out"))
    made = "0 sidecars made, 4 found whole" in last
    return Row(
        check="an index in two parts, then its manifest",
        expected="the last job finds all 4 sidecars and writes the manifest",
        found=f"found: {made}, manifest: {(output / 'dataset.set').exists()}",
        holds=made and (output / "dataset.set").exists(),
    )


def incidents(node: str, number: int) -> str:
    """Return incidents of a node, hours apart: each an event of its own."""
    now = time.time()
    lines = [{"kind": "rank_died", "node": node, "time_unix_s": now - 7200 * i}
             for i in range(number)]  # fmt: skip
    return "".join(f"{json.dumps(line)}\n" for line in reversed(lines))


CHECKS: tuple[Callable[[Place], Row], ...] = (
    check_tasks,
    check_wrong,
    check_chain,
    check_signals,
    check_killed_rank,
    check_singleton,
    check_nodes,
    check_sweep,
)


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    return "\n".join(
        f"{'ok     ' if row.holds else 'DIFFERS'} {row.seconds:4.0f} s  {row.check}\n"
        f"          expected  {row.expected}\n          found     {row.found}"
        for row in rows
    )


def run_checks(root: Path, only: str) -> tuple[list[Row], dict[str, Any]]:
    """Run the checks on a SLURM of their own; one that fails does not stop the others."""
    place = make_place(root)
    rows: list[Row] = []
    with local_slurm():
        for check in CHECKS:
            if only not in check.__name__:
                continue
            begun = time.monotonic()
            try:
                row = check(place)
            except (SlurmError, subprocess.TimeoutExpired, OSError, KeyError) as error:
                row = Row(check=check.__name__, expected="no error", found=str(error), holds=False)
                command("scancel", "--user=root", check=False)
                wait_until(lambda: not jobs(), seconds=90, what="the queue is empty")
            rows.append(Row(**{**asdict(row), "seconds": round(time.monotonic() - begun, 1)}))
            print(table(rows[-1:]), flush=True)
        version = command("sbatch", "--version").strip()
    return rows, {"slurm": version, "steps": place.steps, "cores": os.cpu_count()}


def main() -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", default="", help="checks whose name has this word")
    asked = parser.parse_args()
    begun = time.monotonic()
    # so that what was started is ended, too, when this is
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        ensure_installed()
        with tempfile.TemporaryDirectory(prefix="slurm-runs-") as folder:
            rows, origin = run_checks(Path(folder), asked.only)
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = round(time.monotonic() - begun)
    print(f"{sum(row.holds for row in rows)} of {len(rows)} hold, {seconds} s in all")
    if asked.json is not None:
        record = {**provenance(), **origin, "seconds": seconds, "rows": [asdict(r) for r in rows]}
        asked.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
