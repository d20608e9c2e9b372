"""What does a person want to see of an event, in which order?

What has happened and what is to blame first; then the evidence, the worst before the rest; last
what to type next. Pure: text of a bundle (event_bundle.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.monitor.spike_cause import outliers

_BARS = " .:-=+*#%@"
"""From the lowest value to the highest."""
_SERIES = (
    "loss",
    "loss_max",
    "gradient_norm",
    "lr",
    "spike_z",
    "spike_state",
    "update_over_weight",
)
_NUM_ROWS = 8
_NUM_MODULES = 5
_WHAT = {
    "skip": "its batch was left out: an entry of the ledger; no weight has moved by it",
    "flagged": "it was trained on: recovery.policy=watch",
    "spike": "it was trained on, and the run watched for five ordinary steps or a divergence",
    "diverged": "with recovery.policy=rewind it went back to before the onset; else it went on",
    "non_finite": "no weight has moved by it",
}
Bundle = Mapping[str, Any]


def event_text(bundle: Bundle, *, folder: str, sequences: int, characters: int) -> str:
    """Return an event as a person reads it.

    Args:
        bundle: of the event.
        folder: the run's, for the commands.
        sequences: of the worst, with their text.
        characters: at most so many of each piece of text.
    """
    return "\n".join(
        (
            *_head(bundle),
            "",
            *_cause(bundle),
            "",
            *_worst(bundle),
            "",
            *_text(bundle, sequences=sequences, characters=characters),
            *_series(bundle),
            "",
            *_inside(bundle),
            *_next(bundle, folder=folder),
        )
    )


def _head(bundle: Bundle) -> Iterator[str]:
    yield (
        f"{bundle['kind']} at step {bundle['step']}, batch {bundle['batch']} of run"
        f" {bundle['run']}, attempt {bundle['attempt']}"
    )
    yield f"  {bundle['text']}"
    scores = ", ".join(f"{name} {score:.1f}" for name, score in bundle["scores"].items())
    yield (
        f"  loss {bundle['loss']:.4f}, gradient norm {bundle['gradient_norm']:.4g}, learning rate"
        f" {bundle['lr']:.3g}" + (f"; robust deviations: {scores}" if scores else "")
    )
    yield (
        f"  stage {bundle['stage']}, {bundle['global_sequences']} sequences of"
        f" {bundle['window_tokens']} tokens; ledger entries {bundle['ledger']['entries']},"
        f" configuration {bundle['config_sha256'][:12]}"
    )
    yield f"  what the run did: {_WHAT[bundle['kind']]}"


def _cause(bundle: Bundle) -> Iterator[str]:
    cause = bundle["cause"]
    yield f"likely cause: {cause['kind']}"
    for reason in cause["reasons"]:
        yield f"  - {reason}"
    rerun = bundle["rerun"]
    yield f"computed again: {rerun['verdict']} ({rerun['text']})"
    if asked := bundle["ordinary"]:
        yield (
            f"the newest ordinary batch, {asked['batch']} of step {asked['step']}: loss"
            f" {asked['loss_then']:.4f} then, {asked['loss_now']:.4f} with the weights of the event"
        )


def _worst(bundle: Bundle) -> Iterator[str]:
    losses = [loss for loss in bundle["sequences"].get("loss", []) if math.isfinite(loss)]
    if not losses:
        yield "sequences: none has a loss that is a number"
        return
    middle, outside = outliers(losses)
    yield (
        f"sequences by loss, the worst first: {len(losses)}, median {middle:.3f}, {len(outside)}"
        " of them stand out"
    )
    yield f"{'loss':>9} {'step':>7} {'batch':>7} {'slot':>6} {'sample':>10}  bucket, document, text"
    for slot in bundle["worst"][:_NUM_ROWS]:
        pieces = slot.get("pieces", [])
        piece = max(pieces, key=lambda one: one["tokens"], default=None)
        said = "" if piece is None else f", {piece['source']} {piece['document']}, "
        words = "" if piece is None else repr(piece["text"][:40])
        yield (
            f"{slot['loss']:>9.4f} {slot['step']:>7} {slot['batch']:>7} {slot['slot']:>6}"
            f" {slot['sample']:>10}  {slot['bucket']}{said}{words}"
        )


def _text(bundle: Bundle, *, sequences: int, characters: int) -> Iterator[str]:
    for slot in bundle["worst"][:sequences]:
        yield (
            f"sample {slot['sample']}: {slot['bucket']}, window {slot['window']}, epoch"
            f" {slot['epoch']}, loss {slot['loss']:.4f}"
        )
        for piece in slot.get("pieces", []):
            period, times = piece["repeats"]
            said = f"; {period} tokens repeated {times} times" if times > 4 else ""
            yield (
                f"  {piece['source']} {piece['document']}  {piece['place']}  tokens"
                f" {piece['offset']} .. {piece['offset'] + piece['tokens']}{said}"
            )
            is_cut = piece["is_cut"] or len(piece["text"]) > characters
            yield f"    {piece['text'][:characters]!r}{'...' if is_cut else ''}"
        yield ""
    if bundle["text_problem"]:
        yield f"text: {bundle['text_problem']}"
        yield ""


def _series(bundle: Bundle) -> Iterator[str]:
    """Yield a line of bars for each series, the step of the event last."""
    series = bundle["series"]
    steps = series.get("step", [])
    if not steps:
        yield "steps before: no records"
        return
    yield f"steps {steps[0]} to {steps[-1]}, and the event:"
    for name in _SERIES:
        values = [*series.get(name, []), bundle.get(name)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(set(known)) > 1:
            yield (f"{name:>20}  |{sparkline(values)}|  {min(known):.4g} .. {max(known):.4g}")


def sparkline(values: Sequence[float | None]) -> str:
    """Return a character for each value, darker where it is higher; `?` where it is none.

    `[0, 3, 9]` is ` -@`. What is missing is a gap.

    Args:
        values: any numbers; None where there is none.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "".join(" " if value is None else "?" for value in values)
    low, width = min(known), max(known) - min(known)

    def bar(value: float | None) -> str:
        if value is None:
            return " "
        if not math.isfinite(value):
            return "?"
        return _BARS[round((value - low) / width * (len(_BARS) - 1))] if width else _BARS[0]

    return "".join(map(bar, values))


def _inside(bundle: Bundle) -> Iterator[str]:
    """Yield what stands out of gradients and experts."""
    norms: Mapping[str, float] = bundle["module_gradient_norms"]
    if norms:
        largest = sorted(norms, key=lambda name: -_rank(norms[name]))[:_NUM_MODULES]
        told = ", ".join(f"{name} {norms[name]:.4g}" for name in largest)
        yield f"largest gradient norms of modules: {told}"
    first, rows = bundle["experts"]["first_layer"], bundle["experts"]["tokens"]
    found = [
        (max(row) * len(row) / sum(row), sum(count == 0 for count in row), first + number)
        for number, row in enumerate(rows)
        if sum(row)
    ]
    if found:
        load, dead, layer = max(found)
        yield (
            f"experts: the busiest of layer {layer} has {load:.2f} times the mean, {dead} there got"
            f" no token; {sum(one[1] for one in found)} without a token in all layers"
        )
    if norms or found:
        yield ""


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _next(bundle: Bundle, *, folder: str) -> Iterator[str]:
    step, batch = bundle["step"], bundle["batch"]
    yield "next:"
    worst = next(iter(bundle["worst"]), None)
    if worst is not None and bundle["kind"] not in ("skip", "diverged"):
        yield (
            f"  python launch/inspect_data.py action=explain run={folder} sample={worst['sample']}"
        )
    if bundle["kind"] in ("flagged", "spike") and bundle["cause"]["kind"] == "data":
        yield (
            "  to leave it out, go on from a checkpoint before it with"
            f" change.skip=['{worst['batch'] if worst else batch}:"
            f"{(worst['batch'] if worst else batch) + 1}'] change.reason='why'"
        )
    yield f"  python launch/inspect_data.py action=audit run={folder}"
    if bundle["cause"]["kind"] == "hardware":
        interval = "recheck.sample_interval_steps=100"
        yield f"  {interval} names the rank if it happens again: docs/reliability_numbers.md"
    if step > 0:
        yield f"  python launch/replay_spikes.py series={folder}/metrics.jsonl"
