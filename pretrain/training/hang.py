"""What does the record of a hang say?

One incident names the rank, its node and what it was doing, the first collective in which others
wait for it, and where the stacks are. A person reads the sentence, a program the detail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from parallel.watch import Report
from pretrain.monitor.incidents import Incident, Kind
from pretrain.training.exit_file import INFRASTRUCTURE

_DEAD = ("gone", "Z", "X")
"""States of processes that have ended, awaited by their parent or not."""
_MAX_NAMED = 8
"""Ranks in a sentence, and whose places the detail holds; files hold all."""


def incident_of(found: Report) -> Incident:
    """Return the incident that says what the watch has found, and who is to blame."""
    culprits, beats = found.verdict.culprits, found.beats
    beat = beats.get(culprits[0]) if culprits else None
    states = [found.states.get(rank, "") for rank in found.finding.silent]
    has_died = bool(states) and all(state.startswith(_DEAD) for state in states)
    kind: Kind = "rank_died" if has_died else "hang"
    return Incident(
        kind=kind,
        text=_sentence(found),
        step=min((b.step for b in beats.values()), default=None) if beat is None else beat.step,
        rank=culprits[0] if culprits else None,
        node="" if beat is None else beat.node,
        detail={
            "ranks": list(culprits),
            "nodes": sorted({beats[rank].node for rank in culprits if rank in beats}),
            "phase": None if beat is None else beat.phase,
            "seconds": round(found.finding.seconds, 3),
            **_collectives(found),
            "process_states": {str(rank): state for rank, state in found.states.items()},
            "where": {str(r): found.traces[r].where for r in sorted(found.traces)[:_MAX_NAMED]},
            "not_answered": sorted(
                rank for rank, b in beats.items() if not b.left and rank not in found.traces
            ),
            "stacks": str(found.folder),
        },
    )


def _collectives(found: Report) -> Mapping[str, object]:
    missing, mismatch = found.verdict.missing, found.verdict.mismatch
    detail: dict[str, object] = {"missing": None, "mismatch": None}
    if missing is not None:
        detail["missing"] = {**asdict(missing.entered), "by": missing.by, "not_by": missing.not_by}
    if mismatch is not None:
        pairs = zip(mismatch.ranks, mismatch.entered, strict=True)
        detail["mismatch"] = [{"rank": rank, **asdict(entered)} for rank, entered in pairs]
    return detail


def _sentence(found: Report) -> str:
    end = f"every rank ends with {INFRASTRUCTURE}; stacks are in {found.folder}"
    if found.store_error:
        store = "the rendezvous store, by which ranks watch each other, is gone"
        place = "; it lives in torchrun's agent on the first node, else in rank 0"
        return f"{store}: {found.store_error}{place}; {end}"
    missing, mismatch = found.verdict.missing, found.verdict.mismatch
    parts = [_who(found)]
    if mismatch is not None:
        told = [
            f"rank {rank} entered {entered} in {_where(found, rank)}"
            for rank, entered in zip(mismatch.ranks, mismatch.entered, strict=True)
        ]
        parts.append(f"collectives do not match: {', '.join(told)}")
    if missing is not None:
        parts.append(f"{_ranks(missing.by)} wait for {_ranks(missing.not_by)} in {missing.entered}")
    return "; ".join([*parts, end])


def _who(found: Report) -> str:
    """Return who is to blame and where it stands, of several the first ones."""
    seconds = f"{found.finding.seconds:.1f} s"
    said: list[str] = []
    for rank in found.verdict.culprits[:_MAX_NAMED]:
        beat = found.beats.get(rank)
        place = "" if beat is None else f" on {beat.node} (phase {beat.phase}, {beat.step} steps)"
        if rank in found.finding.silent:
            state = found.states.get(rank, "of another node")
            said.append(f"rank {rank}{place} sent no beat for {seconds}, process state {state}")
        elif found.verdict.missing is not None and rank in found.verdict.missing.not_by:
            said.append(
                f"rank {rank}{place} stands in {_where(found, rank)} and holds up the others"
            )
        else:
            said.append(f"rank {rank}{place} stands in {_where(found, rank)}")
    silence = f"no rank has gone on for {seconds}"
    if not said:
        return f"{silence}, and what they entered does not tell which holds up the others"
    return "; ".join(said if found.finding.silent else [silence, *said])


def _where(found: Report, rank: int) -> str:
    trace = found.traces.get(rank)
    return trace.where if trace is not None and trace.where else "an unknown place"


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"ranks {list(ranks[:_MAX_NAMED])}{more}"
