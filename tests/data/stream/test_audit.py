"""Attempts of a run that were killed, in the middle of an interval or not, are told from gaps."""

from dataclasses import replace
from typing import Any

import pytest

from data.indexed.dataset_manifest import Bucket
from data.stream.audit import audit_records, audit_replicas
from data.stream.consumed import steps_digest
from data.stream.ledger import Entry, Ledger, begin_ledger
from data.stream.order import Segment
from data.stream.report import audit_text, ledger_text

SEED, INTERVAL = 3, 10
BUCKETS = {
    Bucket(domain=domain, language="", quality_tier=0, difficulty_tier=0, window_tokens=64): 500
    for domain in ("code", "web")
}
LEDGER = begin_ledger(
    BUCKETS,
    [Segment(num_batches=40, global_sequences=4, weights=(1, 3), window_tokens=64, stage="all")],
    dataset="",
    curriculum="",
)
SKIPPED = LEDGER.with_entry(Entry(kind="skip", first_batch=16, num_batches=3, reason="spikes"))


def attempt(
    number: int, ledger: Ledger, *, first: int, last: int, saved: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Return the records of steps first + 1 .. last; a digest is also written where it is saved."""
    records: list[dict[str, Any]] = []
    order, timetable, since = ledger.order(seed=SEED), ledger.timetable(), first
    for step in range(first + 1, last + 1):
        batch = min(ledger.batch_of(step), timetable.num_batches)
        record: dict[str, Any] = {
            "attempt": number,
            "step": step,
            "stage": "all",
            "window_tokens": 64,
            "global_sequences": 4,
            "tokens": timetable.tokens_before(batch),
        }
        records.append(record)
        if step % INTERVAL == 0 or step == ledger.num_steps or step in saved:
            read = steps_digest(order, ledger, first_step=since, last_step=step)
            digest = {"consumed_from_step": since, "consumed": f"{read:016x}"}
            if step in saved:
                records.append({"attempt": number, "step": step, **digest})
            else:
                record |= digest
            since = step
    return records


def differences(ledger: Ledger, records: list[dict[str, Any]], *, done: int = 0) -> tuple[str, ...]:
    audit = audit_records(ledger, records, seed=SEED, interval_steps=INTERVAL, done_steps=done)
    return audit.differences


def test_an_interval_that_a_later_attempt_cuts_counts_for_its_first_steps() -> None:
    records = attempt(1, LEDGER, first=0, last=25) + attempt(2, LEDGER, first=15, last=40)
    assert differences(LEDGER, records) == ()
    assert differences(LEDGER, [r for r in records if (r["attempt"], r["step"]) != (1, 20)]) == (
        "steps 11 .. 15: no digest is recorded",
    )


def test_an_attempt_that_did_not_know_of_a_skip_is_measured_by_the_ledger_it_had() -> None:
    before = attempt(1, LEDGER, first=0, last=25)
    records = before + attempt(2, SKIPPED, first=15, last=SKIPPED.num_steps)
    assert differences(SKIPPED, records) == ()
    for record in before:
        if record["step"] == 20:
            record["consumed"] = "0" * 16
    assert len(differences(SKIPPED, records)) == 1


def test_a_stop_between_two_digests_is_a_gap_unless_one_is_written_with_the_checkpoint() -> None:
    later = attempt(2, LEDGER, first=13, last=40)
    assert differences(LEDGER, attempt(1, LEDGER, first=0, last=13) + later) == (
        "steps 11 .. 13: no digest is recorded",
    )
    assert differences(LEDGER, attempt(1, LEDGER, first=0, last=13, saved=(13,)) + later) == ()


def test_an_attempt_of_which_nothing_is_left_is_left_out_and_counted() -> None:
    records = attempt(1, LEDGER, first=0, last=25) + attempt(2, LEDGER, first=0, last=40)
    audit = audit_records(LEDGER, records, seed=SEED, interval_steps=INTERVAL, done_steps=40)
    assert (audit.differences, audit.num_superseded, audit.num_intervals) == ((), 2, 4)
    assert "2 left out" in audit_text(audit)


def test_steps_that_a_run_has_done_and_not_recorded_are_named() -> None:
    records = attempt(1, LEDGER, first=0, last=35)
    assert differences(LEDGER, records) == ()
    assert differences(LEDGER, records, done=38) == ("steps 36 .. 38: no step is recorded",)
    assert "steps 31 .. 40: no digest is recorded" in differences(LEDGER, records, done=40)


def test_counts_are_those_of_the_mixture() -> None:
    audit = audit_replicas(SKIPPED, seed=SEED, steps=range(37), ranks=2, micro_batch=lambda _: 2)
    assert audit.differences == ()
    assert sum(count.windows for count in audit.counts) == 37 * 4
    assert [count.windows for count in audit.counts] == pytest.approx([37, 111], abs=4)
    assert "skip  spikes" in ledger_text(SKIPPED)
    with pytest.raises(ValueError, match=r"ranks=3 \* micro_batch=2 must divide"):
        audit_replicas(SKIPPED, seed=SEED, steps=range(1), ranks=3, micro_batch=lambda _: 2)


def test_a_plan_that_was_changed_under_way_is_counted_by_both_mixtures() -> None:
    plan = LEDGER.entries[0]
    new = replace(
        plan,
        first_batch=10,
        reason="more code",
        segments=(replace(plan.segments[0], num_batches=20, weights=(1, 1)),),
    )
    changed = LEDGER.with_entry(new)
    records = attempt(1, LEDGER, first=0, last=10) + attempt(2, changed, first=10, last=30)
    assert differences(changed, records) == ()
    assert differences(LEDGER, records) != ()
