"""Which layouts give the model of one rank, and which do not?

Every factorisation of the ranks, and every case of the cover of options, runs in one pool of ranks,
regrouped for each. A case passes if nothing that was measured is further from the single rank, run
with the same load balance in the same precision, than rounding explains.
One that fails or hangs is reported, its ranks are killed and started afresh.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from parallel.layout import Layout, LayoutError
from parallel.spawn import RankError, RankPool
from pretrain.model.cuts import check_cuts
from pretrain.monitor.provenance import provenance
from pretrain.training.cover import Case, option_cases
from pretrain.training.probe import (
    Deviation,
    Measured,
    compare_with_reference,
    write_reference,
)
from pretrain.training.verification import Probe, Verification


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerances:
    """How far a case may be from the single rank."""

    loss: float
    """Relative, of each step's loss and MTP loss."""
    norm: float
    """Relative, of each step's global gradient norm."""
    gradient: float
    """Of the root mean square of each tensor's gradient: the largest entry, in bf16 the mean."""
    weight: float
    """The same, of the way a weight can go, the sum of learning rates."""
    other_experts: float
    """Part of the tokens that may choose other experts, over layers and steps, in bf16 over layers
    of the first step; 0: tokens per expert are equal, too."""


TOLERANCES = {
    # Weights: measured 1e-4. Adam divides by the gradient's size, so with a tiny eps an entry near
    # zero would move by its rounding.
    "fp32": Tolerances(loss=2e-6, norm=1e-5, gradient=1e-4, weight=1e-3, other_experts=0.0),
    # bf16 keeps 8 bits: sums in another order lose other bits. A router between two nearly equal
    # scores then chooses another expert: for 9% of the tokens of the first step at most, more from
    # layer to layer, none where no sum changes its order (pp alone). Such a token gives its
    # gradient to another expert, and Adam's first steps have the size of the learning rate whatever
    # the gradient's. Measured on 2 to 8 ranks: loss 7e-3, norm 6e-2, gradient 0.65, weight 0.80.
    # A part that is missing, or there twice, is 1.0 of a gradient; fp32 is for finer questions.
    "bf16": Tolerances(loss=2e-2, norm=0.1, gradient=0.8, weight=1.0, other_experts=0.2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of one case."""

    layout: str
    """Sizes of the axes."""
    options: str
    """Names of the options; empty: those of the configured probe."""
    verdict: str
    """ok, differs, refused, failed."""
    loss: float = 0.0
    """Largest relative difference of a step's loss."""
    norm: float = 0.0
    """The same of the gradient norm."""
    gradient: float = 0.0
    """Largest difference of a gradient, of its tensor's root mean square; in bf16 the root mean
    square of the differences."""
    weight: float = 0.0
    """The same of a weight, of the sum of learning rates."""
    experts_equal: bool = True
    """Whether every expert of every layer got as many tokens."""
    other_experts: float = 0.0
    """Part of the tokens, by layer and step, that chose other experts."""
    where: str = ""
    """The tensor that is furthest off, or why the case did not run."""
    detail: str = ""
    """What a case that failed said: a traceback, or the stack of every rank that hung."""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Layout and options, as `Case.name`."""
        return f"{self.layout} {self.options}".rstrip()


def factorisations(num_ranks: int) -> list[dict[str, int]]:
    """Return every (tp, cp, pp, ep, etp) that divides the ranks on both grids, largest tp last."""
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    return [
        {"num_ranks": num_ranks, "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
        for tp, cp, pp, ep, etp in itertools.product(sizes, repeat=5)
        if num_ranks % (tp * cp * pp) == 0 and num_ranks % (ep * etp * pp) == 0
    ]


def cases(asked: Verification) -> list[Case]:
    """Return what is to be run: every factorisation, the cover of options, or both."""
    layouts = [_layout_case(asked.probe, sizes) for sizes in factorisations(asked.ranks)]
    options = option_cases(asked.probe, num_ranks=asked.ranks)
    wanted = {"layouts": layouts, "options": options, "all": [*layouts, *options]}[asked.what]
    return [case for case in wanted if asked.only in case.name]


def _layout_case(probe: Probe, sizes: dict[str, int]) -> Case:
    """Return the probe on a layout, in as few micro-batches as show what several of them do.

    Two, and one for each pipeline stage: with eight ranks on two cores most of the time goes to
    messages, and there are as many in a small micro-batch as in a large one.
    """
    dp = sizes["num_ranks"] // (sizes["tp"] * sizes["cp"] * sizes["pp"])
    sequences = probe.global_sequences // dp
    most = max(probe.micro_sequences, sequences // max(2, sizes["pp"]))
    micro = max(n for n in range(1, most + 1) if sequences % n == 0)
    return Case(sizes=sizes, probe=replace(probe, micro_sequences=micro))


class References:
    """What single ranks measured and wrote, by what they ran; each runs once."""

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        """Name the folder that gets a file for each."""
        self._folder = folder
        self._timeout_s = timeout_s
        self._found: dict[str, tuple[Measured, Path]] = {}

    def of(self, case: Case) -> tuple[Measured, Path]:
        """Return what the single rank of a case measured, and the file that it wrote."""
        key = json.dumps(asdict(case.reference), sort_keys=True, default=str)
        if key not in self._found:
            path = self._folder / f"reference_{len(self._found)}.pt"
            with _pool(1) as single:
                [measured] = single.run(
                    write_reference, case.reference, path, timeout_s=self._timeout_s
                )
            self._found[key] = (measured, path)
        return self._found[key]


def verify(asked: Verification, *, show: Callable[[Verdict, int, int], None]) -> list[Verdict]:
    """Run every case and return the verdicts.

    Args:
        asked: which cases. Its folder holds the references and, line by line, what is done: a
            second start goes on there.
        show: told of each verdict, with how many are done and how many there are.
    """
    folder = asked.folder / f"ranks_{asked.ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder, json.dumps(asdict(asked.probe), sort_keys=True, default=str))
    references = References(folder, timeout_s=asked.timeout_s)
    candidates = cases(asked)
    verdicts: list[Verdict] = []
    with _pool(asked.ranks) as pool:
        for case in candidates:
            if case.name not in done:
                expected, path = references.of(case)
                verdict = judge(case, expected, path, pool=pool, timeout_s=asked.timeout_s)
                done[case.name] = verdict
                with (folder / "verdicts.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(verdict)) + "\n")
            verdicts.append(done[case.name])
            show(done[case.name], len(verdicts), len(candidates))
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
        return {v.name: v for v in found if v.verdict in ("ok", "refused")}
    verdicts.unlink(missing_ok=True)
    path.write_text(plan, encoding="utf-8")
    return {}


def judge(
    case: Case, expected: Measured, reference: Path, *, pool: RankPool, timeout_s: float
) -> Verdict:
    """Return what becomes of one case.

    Args:
        case: the layout and what it runs.
        expected: what the single rank measured.
        reference: what it wrote.
        pool: the layout's ranks.
        timeout_s: it is killed after.
    """
    started = time.monotonic()
    not_run = partial(Verdict, layout=case.layout, options=case.options)
    try:
        layout = Layout(**case.sizes)
        tokens = case.probe.sequence_tokens
        check_cuts(case.probe.model, layout=layout, sequence_tokens=tokens)
    except LayoutError as error:
        return not_run(verdict="refused", where=str(error))
    try:
        answers = pool.run(
            compare_with_reference, case.probe, layout, reference, timeout_s=timeout_s
        )
    except RankError as error:
        said = str(error).strip()
        seconds = time.monotonic() - started
        where = said.splitlines()[-1]
        return not_run(verdict="failed", where=where, detail=said, seconds=seconds)
    return _verdict(case, expected, answers, seconds=time.monotonic() - started)


def _verdict(
    case: Case,
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
    other_experts = answers[0][1].other_experts
    allowed = TOLERANCES["fp32" if case.probe.precision.kind == "fp32" else "bf16"]
    experts_equal = measured.expert_tokens == expected.expert_tokens
    alike = all(other == measured for other, _ in answers)
    limits = (
        (loss / allowed.loss, "loss"),
        (norm / allowed.norm, "gradient norm"),
        (gradient / allowed.gradient, f"gradient of {gradient_at}"),
        (weight / allowed.weight, f"weight {weight_at}"),
        (_share(other_experts, allowed.other_experts), "chosen experts"),
        (0.0 if experts_equal or allowed.other_experts else 2.0, "tokens per expert"),
        (0.0 if alike else 2.0, "ranks disagree"),
    )
    # not (x <= 1), so that a NaN is a difference
    passed = all(share <= 1 for share, _ in limits)
    return Verdict(
        layout=case.layout,
        options=case.options,
        verdict="ok" if passed else "differs",
        loss=loss,
        norm=norm,
        gradient=gradient,
        weight=weight,
        experts_equal=experts_equal,
        other_experts=other_experts,
        where=max(limits)[1],
        seconds=seconds,
    )


def _share(value: float, allowed: float) -> float:
    return value / allowed if allowed else 2.0 * (value > 0)


def _relative(given: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(given, expected, strict=True))


def _worst(found: Iterable[dict[str, float]]) -> tuple[float, str]:
    """Return the largest value over ranks and keys, NaN before all, and its key."""
    entries = [(value, key) for side in found for key, value in side.items()]
    nan = [entry for entry in entries if entry[0] != entry[0]]
    return (nan or [max(entries)])[0]


HEADER = (
    f"{'layout':<24} {'verdict':<8} {'loss':>8} {'norm':>8} {'gradient':>9} {'weight':>8}"
    f" {'experts':>8} {'s':>6}  furthest off; options"
)
KINDS = ("ok", "refused", "differs", "failed")


def row(verdict: Verdict) -> str:
    """Return a verdict as a row of the matrix; `HEADER` is its head."""
    options = f"; {verdict.options}" if verdict.options else ""
    return (
        f"{verdict.layout:<24} {verdict.verdict:<8} {verdict.loss:>8.1e} {verdict.norm:>8.1e}"
        f" {verdict.gradient:>9.1e} {verdict.weight:>8.1e} {verdict.other_experts:>8.1e}"
        f" {verdict.seconds:>6.1f}  {verdict.where}{options}"
    )


def print_matrix(asked: Verification, *, reference: str) -> int:
    """Run and print every case; return the exit code, 1 if one differs or failed.

    Args:
        asked: which cases.
        reference: what was found of the single rank, for the JSON.
    """
    started = time.monotonic()
    print(HEADER)

    def show(verdict: Verdict, done: int, total: int) -> None:
        left_s = (time.monotonic() - started) * (total - done) / done
        print(f"{row(verdict)}  [{done}/{total}, {left_s:.0f} s left]", flush=True)

    verdicts = verify(asked, show=show)
    count = {kind: sum(v.verdict == kind for v in verdicts) for kind in KINDS}
    for verdict in verdicts:
        if verdict.detail:
            print(f"\n{verdict.name}\n{verdict.detail}\n")
    numbers = ", ".join(f"{number} {kind}" for kind, number in count.items())
    elapsed_s = time.monotonic() - started
    print(f"{numbers} of {len(verdicts)} cases in {elapsed_s:.0f} s")
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
