"""Which layouts give the model of one rank, and which do not?

Every factorisation of the ranks runs the same probe in one pool of ranks, regrouped for each. A
layout passes if nothing that was measured is further from the single rank than rounding explains.
One that fails or hangs is reported, its ranks are killed and started afresh.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.layout import Layout, LayoutError
from parallel.spawn import RankError, RankPool
from pretrain.monitor.provenance import provenance
from pretrain.training.probe import (
    Deviation,
    Measured,
    compare_with_reference,
    write_reference,
)
from pretrain.training.verification import Probe, Verification

LOSS_TOLERANCE = 2e-6
"""Relative, of each step's loss."""
NORM_TOLERANCE = 1e-5
"""Relative, of each step's global gradient norm."""
GRADIENT_TOLERANCE = 1e-4
"""Of the root mean square of each tensor's gradient, largest entry."""
WEIGHT_TOLERANCE = 1e-3
"""Of the way a weight can go, the sum of learning rates; measured: 1e-4. Adam divides by the
gradient's size, so with a tiny eps an entry near zero would move by its rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of one layout."""

    layout: str
    verdict: str
    """ok, differs, refused, failed."""
    loss: float = 0.0
    """Largest relative difference of a step's loss."""
    norm: float = 0.0
    """The same of the gradient norm."""
    gradient: float = 0.0
    """Largest difference of a gradient, of its tensor's root mean square."""
    weight: float = 0.0
    """Largest difference of a weight, of the sum of learning rates."""
    experts_equal: bool = True
    where: str = ""
    """The tensor that is furthest off, or why the layout did not run."""
    seconds: float = 0.0


def factorisations(num_ranks: int) -> list[dict[str, int]]:
    """Return every (tp, cp, pp, ep, etp) that divides the ranks on both grids, largest tp last."""
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    return [
        {"num_ranks": num_ranks, "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
        for tp, cp, pp, ep, etp in itertools.product(sizes, repeat=5)
        if num_ranks % (tp * cp * pp) == 0 and num_ranks % (ep * etp * pp) == 0
    ]


def verify(
    probe: Probe,
    *,
    num_ranks: int,
    only: str,
    folder: Path,
    timeout_s: float,
    show: Callable[[Verdict, int, int], None],
) -> list[Verdict]:
    """Run every factorisation of `num_ranks` and return the verdicts.

    Args:
        probe: what each runs.
        num_ranks: local ranks.
        only: run layouts whose name contains this; empty: all.
        folder: holds the reference and, line by line, what is done: a second start goes on there.
        timeout_s: a layout that takes longer is killed.
        show: told of each verdict, with how many are done and how many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = json.dumps(asdict(probe), sort_keys=True, default=str)
    done = _done(folder, plan)
    reference = folder / "reference.pt"
    with _pool(1) as single:
        [expected] = single.run(write_reference, probe, reference, timeout_s=timeout_s)
    candidates = [sizes for sizes in factorisations(num_ranks) if only in _name(sizes)]
    verdicts: list[Verdict] = []
    with _pool(num_ranks) as pool:
        for sizes in candidates:
            name = _name(sizes)
            if name not in done:
                done[name] = judge(
                    probe, sizes, expected, reference, pool=pool, timeout_s=timeout_s
                )
                with (folder / "verdicts.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[name])) + "\n")
            verdicts.append(done[name])
            show(done[name], len(verdicts), len(candidates))
    return verdicts


@contextlib.contextmanager
def _pool(num_ranks: int) -> Iterator[RankPool]:
    pool = RankPool(num_ranks, threads=1)
    try:
        yield pool
    finally:
        pool.close()


def _done(folder: Path, plan: str) -> dict[str, Verdict]:
    """Return the verdicts of an earlier start with the same probe; others are forgotten."""
    path, verdicts = folder / "plan.json", folder / "verdicts.jsonl"
    if path.is_file() and path.read_text(encoding="utf-8") == plan and verdicts.is_file():
        lines = verdicts.read_text(encoding="utf-8").splitlines()
        found = [Verdict(**json.loads(line)) for line in lines]
        return {v.layout: v for v in found if v.verdict in ("ok", "refused")}
    verdicts.unlink(missing_ok=True)
    path.write_text(plan, encoding="utf-8")
    return {}


def _name(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}{sizes[axis]}" for axis in ("tp", "cp", "pp", "ep", "etp"))


def judge(
    probe: Probe,
    sizes: dict[str, int],
    expected: Measured,
    reference: Path,
    *,
    pool: RankPool,
    timeout_s: float,
) -> Verdict:
    """Return what becomes of one layout.

    Args:
        probe: what it runs.
        sizes: of its axes.
        expected: what the single rank measured.
        reference: what it wrote.
        pool: the layout's ranks.
        timeout_s: it is killed after.
    """
    name, started = _name(sizes), time.monotonic()
    try:
        layout = Layout(**sizes)
    except LayoutError as error:
        return Verdict(layout=name, verdict="refused", where=str(error))
    try:
        answers = pool.run(compare_with_reference, probe, layout, reference, timeout_s=timeout_s)
    except RankError as error:
        why = str(error).strip().splitlines()[-1]
        return Verdict(layout=name, verdict="failed", where=why, seconds=time.monotonic() - started)
    return _verdict(name, expected, answers, seconds=time.monotonic() - started)


def _verdict(
    name: str,
    expected: Measured,
    answers: Sequence[tuple[Measured, Deviation]],
    *,
    seconds: float,
) -> Verdict:
    measured = answers[0][0]
    loss = max(
        _relative(measured.losses, expected.losses),
        _relative(measured.mtp_losses, expected.mtp_losses),
    )
    norm = _relative(measured.gradient_norms, expected.gradient_norms)
    gradient, gradient_at = _worst(d.gradients for _, d in answers)
    weight, weight_at = _worst(d.weights for _, d in answers)
    experts_equal = measured.expert_tokens == expected.expert_tokens
    alike = all(other == measured for other, _ in answers)
    limits = (
        (loss / LOSS_TOLERANCE, "loss"),
        (norm / NORM_TOLERANCE, "gradient norm"),
        (gradient / GRADIENT_TOLERANCE, f"gradient of {gradient_at}"),
        (weight / WEIGHT_TOLERANCE, f"weight {weight_at}"),
        (0.0 if experts_equal else 2.0, "tokens per expert"),
        (0.0 if alike else 2.0, "ranks disagree"),
    )
    # not (x <= 1), so that a NaN is a difference
    passed = all(share <= 1 for share, _ in limits)
    return Verdict(
        layout=name,
        verdict="ok" if passed else "differs",
        loss=loss,
        norm=norm,
        gradient=gradient,
        weight=weight,
        experts_equal=experts_equal,
        where=max(limits)[1],
        seconds=seconds,
    )


def _relative(given: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(given, expected, strict=True))


def _worst(found: Iterable[dict[str, float]]) -> tuple[float, str]:
    """Return the largest value over ranks and keys, NaN before all, and its key."""
    entries = [(value, key) for side in found for key, value in side.items()]
    nan = [entry for entry in entries if entry[0] != entry[0]]
    return (nan or [max(entries)])[0]


HEADER = (
    f"{'layout':<24} {'verdict':<8} {'loss':>8} {'norm':>8} {'gradient':>9} {'weight':>8}"
    f" {'s':>6}  furthest off"
)
KINDS = ("ok", "refused", "differs", "failed")


def row(verdict: Verdict) -> str:
    """Return a verdict as a row of the matrix; `HEADER` is its head."""
    return (
        f"{verdict.layout:<24} {verdict.verdict:<8} {verdict.loss:>8.1e} {verdict.norm:>8.1e}"
        f" {verdict.gradient:>9.1e} {verdict.weight:>8.1e} {verdict.seconds:>6.1f}  {verdict.where}"
    )


def print_matrix(asked: Verification, *, reference: str) -> int:
    """Run and print every layout; return the exit code, 1 if one differs or failed.

    Args:
        asked: which layouts.
        reference: what was found of the single rank, for the JSON.
    """
    started = time.monotonic()
    print(HEADER)

    def show(verdict: Verdict, done: int, total: int) -> None:
        left_s = (time.monotonic() - started) * (total - done) / done
        print(f"{row(verdict)}  [{done}/{total}, {left_s:.0f} s left]", flush=True)

    verdicts = verify(
        asked.probe,
        num_ranks=asked.ranks,
        only=asked.only,
        folder=asked.folder / f"ranks_{asked.ranks}",
        timeout_s=asked.timeout_s,
        show=show,
    )
    count = {kind: sum(v.verdict == kind for v in verdicts) for kind in KINDS}
    numbers = ", ".join(f"{number} {kind}" for kind, number in count.items())
    elapsed_s = time.monotonic() - started
    print(f"{numbers} of {len(verdicts)} layouts in {elapsed_s:.0f} s")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        record = provenance() | {
            "ranks": asked.ranks,
            "reference": reference,
            "elapsed_s": sum(v.seconds for v in verdicts),
            "verdicts": [asdict(v) for v in verdicts],
        }
        asked.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(count["differs"] + count["failed"] > 0)
