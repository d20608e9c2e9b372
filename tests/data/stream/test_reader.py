"""What a replica reads in a step: against the order, and whatever cuts the batch among replicas."""

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.indexed.dataset import Dataset, open_dataset
from data.indexed.format import DataError, bin_path
from data.indexed.window_format import win_path
from data.stream.consumed import MASK, steps_digest
from data.stream.ledger import Entry, Ledger, read_ledger, write_ledger
from data.stream.loader import BatchReader, Reading, ReplicaBatch, Share
from data.stream.windows import read_windows, spread_windows

SEED = 7
NUM_STEPS = 15


def reader(
    dataset: Dataset,
    ledger: Ledger,
    *,
    replicas: int = 1,
    replica: int = 0,
    micro: int = 16,
    **reading: Any,
) -> BatchReader:
    share = Share(replicas=replicas, replica=replica, micro_batch_tokens=micro)
    return BatchReader(dataset, ledger, seed=SEED, share=share, reading=Reading(**reading))


def places(batch: ReplicaBatch) -> list[tuple[int, int, int]]:
    found = batch.addresses
    columns = (found.bucket.tolist(), found.window.tolist(), found.epoch.tolist())
    return list(zip(*columns, strict=True))


def test_every_window_is_the_one_that_the_order_names(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    order = small_ledger.order(seed=SEED)
    with open_dataset(small_dataset) as dataset, reader(dataset, small_ledger) as read:
        assert small_ledger.num_steps == NUM_STEPS
        for step in range(NUM_STEPS):
            batch = read.read(step)
            expected = order.addresses(step, np.arange(order.global_sequences(step)))
            assert batch.addresses.window.tolist() == expected.window.tolist()
            for row, (bucket, window, _) in enumerate(places(batch)):
                stored = dataset.read(bucket, window)
                assert batch.windows.tokens[row].tolist() == stored.tokens.tolist()


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("steps", [[0, 1, 2], [9, 10, 14], [5, 5, 4], [14, 0, 1]])
def test_how_far_is_read_ahead_and_where_one_begins_change_nothing(
    depth: int, steps: list[int], small_dataset: Path, small_ledger: Ledger
) -> None:
    with open_dataset(small_dataset) as dataset:
        fresh: list[Any] = []
        for step in steps:
            with reader(dataset, small_ledger) as one:
                fresh.append(one.read(step).windows.tokens.copy())
        with reader(dataset, small_ledger, depth=depth) as read:
            for step, expected in zip(steps, fresh, strict=True):
                assert (read.read(step).windows.tokens == expected).all()


@pytest.mark.parametrize(("replicas", "micro"), [(2, 16), (3, 32), (6, 16), (1, 64), (2, 48)])
def test_any_replicas_read_the_same_batch_and_add_up_to_the_same_digest(
    replicas: int, micro: int, small_dataset: Path, small_ledger: Ledger
) -> None:
    order = small_ledger.order(seed=SEED)
    with open_dataset(small_dataset) as dataset:
        total = 0
        found: list[set[tuple[int, int, int]]] = [set() for _ in range(10)]
        for replica in range(replicas):
            with reader(
                dataset, small_ledger, replicas=replicas, replica=replica, micro=micro
            ) as read:
                for step in range(10):
                    batch = read.read(step)
                    total += batch.digest
                    found[step] |= set(places(batch))
        with reader(dataset, small_ledger) as whole:
            assert found == [set(places(whole.read(step))) for step in range(10)]
    assert total & MASK == steps_digest(order, small_ledger, first_step=0, last_step=10)


def pieces(dataset: Dataset, batch: ReplicaBatch) -> list[tuple[str, int, int, int]]:
    """Return source, document, offset and length of every piece of a replica's windows."""
    found: list[tuple[str, int, int, int]] = []
    for window in batch.windows.stored:
        rows = zip(window.document_ids, window.piece_offsets, window.piece_lengths, strict=True)
        for document, offset, length in rows:
            source, number = dataset.source_of(int(document))
            found.append((source.name, number, int(offset), int(length)))
    return found


@pytest.mark.parametrize("killed_at", range(0, NUM_STEPS + 1, 3))
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1), (3, 6)])
def test_killed_at_any_step_other_replicas_consume_the_same_documents(
    killed_at: int, before: int, after: int, small_dataset: Path, small_ledger: Ledger
) -> None:
    def consumed(dataset: Dataset, replicas: int, steps: range) -> list[list[Any]]:
        by_step: list[list[Any]] = [[] for _ in steps]
        for replica in range(replicas):
            with reader(dataset, small_ledger, replicas=replicas, replica=replica) as read:
                for place, step in enumerate(steps):
                    by_step[place] += pieces(dataset, read.read(step))
        return [sorted(step) for step in by_step]

    with open_dataset(small_dataset) as dataset:
        whole = consumed(dataset, 1, range(NUM_STEPS))
        first = consumed(dataset, before, range(killed_at))
        assert first + consumed(dataset, after, range(killed_at, NUM_STEPS)) == whole


def test_a_digest_tells_a_window_read_twice_in_another_slot_or_not_at_all(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    order = small_ledger.order(seed=SEED)
    whole = steps_digest(order, small_ledger, first_step=0, last_step=10)
    other = small_ledger.order(seed=SEED + 1)
    assert steps_digest(other, small_ledger, first_step=0, last_step=10) != whole
    assert steps_digest(order, small_ledger, first_step=1, last_step=10) != whole
    halves = [steps_digest(order, small_ledger, first_step=a, last_step=a + 5) for a in (0, 5)]
    assert sum(halves) & MASK == whole


def test_the_memory_of_a_batch_is_used_again(small_dataset: Path, small_ledger: Ledger) -> None:
    made: list[tuple[int, int]] = []

    def allocate(shape: tuple[int, int]) -> np.ndarray:
        made.append(shape)
        return np.empty(shape, dtype=np.int32)

    share = Share(replicas=1, replica=0, micro_batch_tokens=16)
    with (
        open_dataset(small_dataset) as dataset,
        BatchReader(
            dataset, small_ledger, seed=SEED, share=share, reading=Reading(), allocate=allocate
        ) as read,
    ):
        for step in range(NUM_STEPS):
            read.read(step)
    assert made.count((12, 17)) <= 4  # two ahead, one lent, one on its way back
    assert made.count((6, 33)) <= 4


def test_a_reader_that_nobody_closed_ends_with_its_owner(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    before = threading.active_count()
    with open_dataset(small_dataset) as dataset:
        read = reader(dataset, small_ledger)
        read.read(0)
        gone = weakref.ref(read)
        del read
        for thread in threading.enumerate():
            if thread.name == "read-ahead":
                thread.join(5)
    assert gone() is None
    assert threading.active_count() <= before


class Slow(Dataset):
    """A dataset whose windows do not come."""

    def read_into(self, *_: Any) -> Any:
        threading.Event().wait(5)
        raise AssertionError


def test_a_file_system_that_does_not_answer_ends_in_a_named_error(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    with open_dataset(small_dataset) as whole:
        slow = Slow(
            whole.manifest,
            check_digests=True,
            patience=whole.patience,
            cache=None,  # type: ignore[arg-type]  no remote shard here
        )
        read = reader(slow, small_ledger, timeout_s=0.05)
        with pytest.raises(DataError, match=r"set\.manifest: the windows of step 3 were not there"):
            read.read(3)


def test_another_dataset_is_refused(small_dataset: Path, small_ledger: Ledger) -> None:
    other = Ledger((Entry(**{**_fields(small_ledger.entries[0]), "dataset": "00" * 32}),))
    with (
        open_dataset(small_dataset) as dataset,
        pytest.raises(DataError, match="the run reads 0000"),
    ):
        reader(dataset, other)


def _fields(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in Entry.__slots__}


# --------------------------------------------------------------------------------------------------
# damage
# --------------------------------------------------------------------------------------------------


def damage(
    manifest: Path, ledger: Ledger, step: int, slot: int, *, more: int = 0
) -> tuple[int, int]:
    """Flip a bit of the window in a slot, and of so many behind it; return bucket and window."""
    found = ledger.order(seed=SEED).addresses(step, [slot])
    bucket, window = int(found.bucket[0]), int(found.window[0])
    with open_dataset(manifest) as dataset:
        for number in range(window, window + 1 + more):
            shard, place = dataset.locate(bucket, number % int(dataset.num_windows[bucket]))
            prefix = dataset.manifest.prefix(int(shard[0]))
            path = bin_path(str(prefix))
            content = bytearray(path.read_bytes())
            content[int(place[0]) * dataset.shard(int(shard[0])).header.window_bytes] ^= 1
            path.write_bytes(content)
    return bucket, window


def test_a_damaged_window_stops_the_run_and_is_named(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    damage(small_dataset, small_ledger, 4, 5)
    with open_dataset(small_dataset) as dataset, reader(dataset, small_ledger) as read:
        read.read(3)
        with pytest.raises(DataError, match=r"\.16\.bin: window \d+ .* the window is damaged"):
            read.read(4)


@pytest.mark.parametrize("more", [0, 2])
def test_a_damaged_window_is_replaced_by_the_next_whole_one_by_the_ledger(
    more: int, small_dataset: Path, small_ledger: Ledger
) -> None:
    bucket, window = damage(small_dataset, small_ledger, 4, 5, more=more)
    with open_dataset(small_dataset) as dataset:
        with reader(dataset, small_ledger, on_damage="replace") as read:
            steps = [read.read(step).windows.tokens.copy() for step in range(10)]
            found = read.new_damage
            assert read.read(4).digest == read.read(4).digest
        size = int(dataset.num_windows[bucket])
        behind = dataset.read(bucket, (window + 1 + more) % size)
        assert steps[4][5].tolist() == behind.tokens.tolist()
        assert {(e.bucket, e.window) for e in found} == {
            (bucket, (window + k) % size) for k in range(1 + more)
        }
        assert "the window is damaged" in found[0].reason
        # what is known is read alike by whoever goes on, without looking at the damage again
        known = small_ledger
        for entry in found:
            known = known.with_entry(entry)
        with reader(dataset, known, on_damage="replace") as again:
            for step, expected in enumerate(steps):
                assert (again.read(step).windows.tokens == expected).all()
            assert again.new_damage == ()


def test_too_much_damage_stops_the_run_all_the_same(
    small_dataset: Path, small_ledger: Ledger
) -> None:
    damage(small_dataset, small_ledger, 4, 5, more=3)
    with (
        open_dataset(small_dataset) as dataset,
        reader(dataset, small_ledger, on_damage="replace", max_replaced=2) as read,
        pytest.raises(DataError, match=r"2 windows were replaced before it.*max_replaced"),
    ):
        read.read(4)


def test_a_file_that_is_gone_is_not_replaced(small_dataset: Path, small_ledger: Ledger) -> None:
    for name in ("code.16", "web.16"):
        win_path(str(small_dataset.parent / name)).unlink()
    with (
        open_dataset(small_dataset) as dataset,
        reader(dataset, small_ledger, on_damage="replace") as read,
        pytest.raises(DataError, match=r"No such file"),
    ):
        read.read(0)


# --------------------------------------------------------------------------------------------------
# windows
# --------------------------------------------------------------------------------------------------


def test_labels_that_are_padding_do_not_count(small_dataset: Path) -> None:
    with open_dataset(small_dataset) as dataset:
        windows = np.arange(int(dataset.num_windows[0]))
        found = read_windows(dataset, np.zeros_like(windows), windows)
        mask, documents = found.described(across_documents=True)
    assert (mask.sum(1) == [window.num_tokens - 1 for window in found.stored]).all()
    assert documents.min() == 0
    inside, _ = found.described(across_documents=False)
    lost = mask & ~inside
    # a label of another document is one behind a closing id
    assert lost.any()
    assert (found.tokens[:, :-1][lost] == 499).all()


def test_validation_windows_are_spread_over_each_domain(small_dataset: Path) -> None:
    with open_dataset(small_dataset) as dataset:
        sizes = dataset.num_windows.tolist()
        for per_domain in (1, 3, 10_000):
            buckets, windows = spread_windows(dataset, per_domain=per_domain)
            domains = [dataset.header.buckets[bucket].domain for bucket in buckets.tolist()]
            assert domains.count("code") == min(per_domain, sizes[0])
            assert domains.count("web") == min(per_domain, sizes[1] + sizes[2])
            places = list(zip(buckets.tolist(), windows.tolist(), strict=True))
            assert len(set(places)) == len(places)
            assert all(0 <= window < sizes[bucket] for bucket, window in places)
    with open_dataset(small_dataset) as dataset, pytest.raises(ValueError, match="per_domain=0"):
        spread_windows(dataset, per_domain=0)


def test_a_ledger_comes_back_from_its_file(small_ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    longer = small_ledger.with_entry(
        Entry(kind="skip", first_batch=3, num_batches=2, reason="loss spike")
    )
    write_ledger(path, longer)
    assert read_ledger(path) == longer
    assert longer.extends(small_ledger)
    assert not small_ledger.extends(longer)
    assert longer.num_steps == small_ledger.num_steps - 2
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"ledger\.jsonl: entry \d"):
        read_ledger(path)
    path.write_text(text.replace("loss spike", "nothing"))
    with pytest.raises(DataError, match=r"ledger\.jsonl: entry 1 was changed"):
        read_ledger(path)
