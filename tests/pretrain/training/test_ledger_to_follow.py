"""What a run that goes on reads: its ledger, and changes by a reason and from the next batch on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.corpus.manifest import dataset_path
from data.indexed.dataset_manifest import (
    Bucket,
    ShardEntry,
    Source,
    read_manifest,
    write_manifest,
)
from data.indexed.dataset_manifest import Manifest as DatasetManifest
from data.indexed.format import DataError
from data.indexed.packing import pack
from data.indexed.shard_check import read_shard
from data.indexed.window_writer import WindowWriter, write_packed
from data.stream.curriculum import Curriculum, Mixture, Stage
from data.stream.ledger import Entry, Ledger, write_ledger
from data.stream.loader import BatchReader, Reading, Share
from parallel.layout import Layout
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.training.change import Change
from pretrain.training.corpus import LEDGER_NAME, Corpus, ledger_to_follow, open_run_corpus
from pretrain.training.run import Run, as_json

MakeRun = Callable[..., Run]
STEP = 10


def curriculum(code: float, *, tokens: int = 100 * 8 * 64) -> Curriculum:
    mixture = Mixture(domains={"code": code, "sentences": 1 - code})
    stage = Stage(tokens=tokens, window_tokens=64, global_sequences=8, begin=mixture)
    return Curriculum(stages={"only": stage}, max_epochs=100.0)


@pytest.fixture
def run(tiny_run: MakeRun, tmp_path: Path) -> Run:
    return tiny_run(micro=1, curriculum=curriculum(0.2), output_root=tmp_path)


@pytest.fixture
def saved(run: Run) -> Manifest:
    """Return the manifest of a checkpoint after ten steps."""
    with open_run_corpus(run) as corpus:
        return Manifest(
            step=STEP,
            sequences=0,
            tokens=0,
            tokenizer_digest="",
            config=as_json(run),
            versions={},
            files={},
            ledger=tuple(corpus.ledger.as_json()),
        )


def follow(run: Run, newest: Manifest | None) -> Ledger:
    with open_run_corpus(run) as corpus:
        return ledger_to_follow(run, corpus, newest=newest)


def write_file(run: Run, ledger: Ledger) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_ledger(run.folder / LEDGER_NAME, ledger)


def places(ledger: Ledger, run: Run, batch: int) -> list[tuple[int, int, int]]:
    found = ledger.order(seed=run.seed).addresses(batch, np.arange(8))
    columns = (found.bucket.tolist(), found.window.tolist(), found.epoch.tolist())
    return sorted(zip(*columns, strict=True))


def test_a_requeued_job_changes_nothing(run: Run, saved: Manifest) -> None:
    first = follow(run, None)
    assert follow(run, saved) == first
    write_file(run, first)
    assert follow(run, saved) == first


def test_what_was_left_out_before_the_first_checkpoint_is_left_out_again(run: Run) -> None:
    skip = Entry(kind="skip", first_batch=3, num_batches=1, reason="loss spike: a test")
    begun = follow(run, None)
    write_file(run, begun.with_entry(skip))
    assert follow(run, None).skipped() == [range(3, 4)]
    other = follow(replace(run, curriculum=curriculum(0.9)), None)  # another run by now
    assert other.skipped() == []


def test_a_file_without_a_checkpoint_that_has_another_plan_or_is_damaged_is_not_followed(
    run: Run, saved: Manifest
) -> None:
    begun = follow(run, None)
    other = replace(run, curriculum=curriculum(0.9), change=Change(reason="more code"))
    write_file(run, follow(other, saved))
    assert follow(run, None) == begun
    (run.folder / LEDGER_NAME).write_text("none")
    assert follow(run, None) == begun


def test_another_curriculum_is_refused_without_a_reason(run: Run, saved: Manifest) -> None:
    other = replace(run, curriculum=curriculum(0.9))
    with pytest.raises(CheckpointError, match=r"follows a curriculum .* from batch 10 on with"):
        follow(other, saved)


def test_with_a_reason_it_is_followed_from_the_next_batch_on(run: Run, saved: Manifest) -> None:
    before = follow(run, saved)
    other = replace(run, curriculum=curriculum(0.9), change=Change(reason="more code"))
    after = follow(other, saved)
    assert [entry.reason for entry in after.entries] == ["the run begins", "more code"]
    assert after.last_plan.first_batch == STEP
    assert after.num_steps == before.num_steps == 100
    for batch in range(STEP):
        assert places(after, run, batch) == places(before, run, batch)
    code = [idx for idx, bucket in enumerate(after.last_plan.buckets) if bucket.domain == "code"]
    order = after.order(seed=run.seed)
    given = order.given(100) - order.given(STEP)
    assert given[code].sum() == pytest.approx(0.9 * 90 * 8, abs=4)
    seen = [place for batch in range(100) for place in places(after, run, batch)]
    assert len(set(seen)) == len(seen)  # no window of an epoch twice, over the change, too
    # a requeued job with the same words adds nothing
    write_file(run, after)
    assert follow(other, saved) == after


def test_a_longer_curriculum_lengthens_the_run(run: Run, saved: Manifest) -> None:
    longer = replace(
        run, curriculum=curriculum(0.2, tokens=150 * 8 * 64), change=Change(reason="more tokens")
    )
    assert follow(longer, saved).num_steps == 150
    shorter = replace(
        run, curriculum=curriculum(0.2, tokens=5 * 8 * 64), change=Change(reason="fewer")
    )
    with pytest.raises(ValueError, match=r"are consumed already: raise the tokens of its last"):
        follow(shorter, saved)


@pytest.mark.parametrize("sequences", [5, 12, 16, 84])
def test_a_change_of_the_batches_loses_no_token(sequences: int, run: Run, saved: Manifest) -> None:
    """80 sequences were read, which is inside a batch of 12 and of 84."""
    stage = Stage(tokens=168 * 64, window_tokens=64, global_sequences=sequences)
    other = Curriculum(stages={"only": stage}, max_epochs=100.0)
    after = follow(replace(run, curriculum=other, change=Change(reason="other batches")), saved)
    assert 168 <= after.timetable().num_sequences < 168 + sequences + 8


def test_batches_are_skipped_once_and_only_before_they_are_read(run: Run, saved: Manifest) -> None:
    skipping = replace(run, change=Change(skip=("20:30", "40:41"), reason="loss spike at 21"))
    ledger = follow(skipping, saved)
    assert ledger.num_steps == 89
    assert ledger.batch_of(20) == 30
    write_file(run, ledger)
    assert follow(skipping, saved) == ledger
    assert follow(run, saved) == ledger  # and it stays without the words
    late = replace(run, change=Change(skip=("5:6",), reason="too late"))
    with pytest.raises(CheckpointError, match=r"batches before 10.*before batch 5 first"):
        follow(late, saved)


def test_what_is_skipped_already_is_no_new_change_for_another_reason(
    run: Run, saved: Manifest
) -> None:
    """The words of the first change stay in the command when a second one is made."""
    first = follow(replace(run, change=Change(skip=("10:20", "20:22"), reason="one")), saved)
    write_file(run, first)
    assert first.batch_of(STEP) == 22
    both = Change(skip=("10:20", "11:22", "30:31"), reason="and another")
    second = follow(replace(run, change=both), saved)
    assert second.extends(first)
    assert [e.first_batch for e in second.entries if e.kind == "skip"] == [10, 20, 30]


def test_batches_behind_the_end_are_not_skipped(run: Run, saved: Manifest) -> None:
    """They would be the first of a later plan, and nobody would know."""
    beyond = replace(run, change=Change(skip=("95:110",), reason="typing"))
    with pytest.raises(CheckpointError, match=r"has 100 batches: give 95:100"):
        follow(beyond, saved)
    ledger = follow(replace(run, change=Change(skip=("95:100",), reason="the end")), saved)
    assert ledger.num_steps == 95


@pytest.mark.parametrize("asked", [Change(skip=("5:7",), reason="spike"), Change(reason="mixture")])
def test_a_change_made_behind_an_older_checkpoint_does_not_count_for_a_newer_one(
    asked: Change, run: Run, saved: Manifest
) -> None:
    """The newer was put away, a change was made at the older, and the newer came back."""
    other = run if asked.skip else replace(run, curriculum=curriculum(0.9))
    changed = follow(replace(other, change=asked), replace(saved, step=5))
    write_file(run, changed)
    assert follow(other, replace(saved, step=5)) == changed
    with pytest.raises(CheckpointError, match=r"batch 5, but the checkpoint of step 10 .* before"):
        follow(other, saved)


def test_caps_count_what_the_run_reads_and_not_what_a_new_one_would(
    run: Run, saved: Manifest
) -> None:
    """Of the new mixture forty batches are left, and code has enough for them."""
    code = sum(
        number
        for bucket, number in zip(*_begun(run), strict=True)
        if (bucket.domain, bucket.window_tokens) == ("code", 64)
    )
    only = Stage(
        tokens=100 * 8 * 64,
        window_tokens=64,
        global_sequences=8,
        begin=Mixture(domains={"code": 1.0}),
    )
    capped = Curriculum(stages={"only": only}, max_epochs=500 / code)
    changed = replace(run, curriculum=capped, change=Change(reason="code at the end"))
    with pytest.raises(ValueError, match="would be gone through too often: code"):
        follow(changed, None)
    after = follow(changed, replace(saved, step=60))
    assert after.last_plan.first_batch == 60
    with pytest.raises(ValueError, match="would be gone through too often: code"):
        follow(changed, replace(saved, step=30))


def _begun(run: Run) -> tuple[tuple[Bucket, ...], tuple[int, ...]]:
    with open_run_corpus(run) as corpus:
        return corpus.ledger.last_plan.buckets, corpus.ledger.last_plan.windows


def test_batches_before_a_later_plan_must_fit_the_layout_too(run: Run, saved: Manifest) -> None:
    """Behind batch 10 batches of 9 would do, but from step 5 on five batches of 8 come first."""
    stage = Stage(tokens=100 * 8 * 64, window_tokens=64, global_sequences=9)
    nines = Curriculum(stages={"only": stage}, max_epochs=100.0)
    changed = replace(run, curriculum=nines, change=Change(reason="batches of 9"))
    write_file(run, follow(changed, saved))
    three = replace(changed, layout=Layout(num_ranks=3))
    assert follow(three, saved).last_plan.first_batch == STEP
    with pytest.raises(ValueError, match=r"batch of 8 sequences given, but dp=3"):
        follow(three, replace(saved, step=5))


def test_a_file_of_another_run_is_refused(run: Run, saved: Manifest) -> None:
    write_file(run, follow(replace(run, curriculum=curriculum(0.5)), None))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl does not begin with the 1 entries"):
        follow(run, saved)


def test_a_checkpoint_without_a_ledger_is_refused(run: Run, saved: Manifest) -> None:
    with pytest.raises(CheckpointError, match=r"has no ledger of its data.*initial_weights"):
        follow(run, replace(saved, ledger=()))


def test_a_run_without_a_checkpoint_begins_anew(run: Run) -> None:
    write_file(run, follow(replace(run, curriculum=curriculum(0.5)), None))
    ledger = follow(run, None)
    assert len(ledger.entries) == 1
    assert ledger.last_plan.curriculum == run.curriculum.digest


def shards_of(old: DatasetManifest) -> list[ShardEntry]:
    """Return the shards of a dataset, for another manifest."""
    return [
        ShardEntry(
            path=str(old.prefix(number)),
            bucket=int(old.bucket[number]),
            written=read_shard(str(old.prefix(number))),
        )
        for number in range(old.num_shards)
    ]


def with_new_text(corpus: Corpus, folder: Path) -> Path:
    """Write a dataset of the corpus's shards and one of a new domain; return its manifest."""
    old = read_manifest(corpus.train.manifest.path)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 400, size=100) for _ in range(300)]
    packing = pack([100] * 300, capacity=65, policy="best_fit", seed=0)
    with WindowWriter(
        folder / "a_new.64",
        window_tokens=64,
        vocab_size=old.header.vocab_size,
        padding_id=old.header.padding_id,
    ) as writer:
        write_packed(writer, documents, packing=packing, document_ids=np.arange(300) + 10**6)
        written = writer.finish()
    shards = shards_of(old)
    new = Bucket(domain="a_new", language="", quality_tier=0, difficulty_tier=0, window_tokens=64)
    source = Source(name="a_new", first_document_id=10**6, num_documents=300)
    buckets = (new, *old.header.buckets)  # in front: the manifest sorts, the ledger appends
    header = replace(old.header, buckets=buckets, sources=(*old.header.sources, source))
    moved = [replace(shard, bucket=shard.bucket + 1) for shard in shards]
    write_manifest(
        folder / "more.manifest",
        header=header,
        shards=[ShardEntry(path="a_new.64", bucket=0, written=written), *moved],
    )
    return folder / "more.manifest"


def test_new_text_is_taken_up_as_a_bucket_behind_the_others(
    run: Run, saved: Manifest, tmp_path: Path
) -> None:
    before = follow(run, saved)
    with open_run_corpus(run) as corpus:
        more = with_new_text(corpus, tmp_path)
        old_buckets = corpus.ledger.last_plan.buckets
    mixture = Mixture(domains={"code": 0.2, "sentences": 0.5, "a_new": 0.3})
    stage = Stage(tokens=100 * 8 * 64, window_tokens=64, global_sequences=8, begin=mixture)
    wider = replace(
        run,
        data=replace(run.data, train=str(more)),
        curriculum=Curriculum(stages={"only": stage}, max_epochs=100.0),
    )
    with pytest.raises(CheckpointError, match="give the same"):
        follow(wider, saved)
    wider = replace(wider, change=Change(reason="new text"))
    after = follow(wider, saved)
    assert after.last_plan.buckets[: len(old_buckets)] == old_buckets
    assert after.last_plan.buckets[-1].domain == "a_new"
    for batch in range(STEP):
        assert places(after, run, batch) == places(before, run, batch)
    share = Share(replicas=1, replica=0, micro_batch_tokens=64)
    with (
        open_run_corpus(wider) as corpus,
        BatchReader(corpus.train, after, seed=run.seed, share=share, reading=Reading()) as reader,
    ):
        found = reader.read(STEP)
        for row, (bucket, window) in enumerate(
            zip(found.addresses.bucket.tolist(), found.addresses.window.tolist(), strict=True)
        ):
            number = corpus.train.header.buckets.index(after.last_plan.buckets[bucket])
            stored = corpus.train.read(number, window)
            assert found.windows.tokens[row].tolist() == stored.tokens.tolist()
    assert len(old_buckets) in found.addresses.bucket  # the new text


def test_text_that_was_taken_away_is_refused(run: Run, saved: Manifest, tmp_path: Path) -> None:
    old = read_manifest(dataset_path(run.data.corpus, "train"))
    header = replace(old.header, buckets=old.header.buckets[:1])
    one = ShardEntry(path=str(old.prefix(0)), bucket=0, written=read_shard(str(old.prefix(0))))
    write_manifest(tmp_path / "less.manifest", header=header, shards=[one])
    less = replace(
        run,
        data=replace(run.data, train=str(tmp_path / "less.manifest")),
        curriculum=Curriculum(
            stages={"only": Stage(tokens=10**5, window_tokens=64, global_sequences=8)},
            max_epochs=10**6,
        ),
        change=Change(reason="less"),
    )
    with pytest.raises((CheckpointError, DataError), match="lacks buckets that the run reads"):
        follow(less, saved)


def test_other_windows_in_a_bucket_that_is_read_are_refused(
    run: Run, saved: Manifest, tmp_path: Path
) -> None:
    """As many windows as before, of the same domains, in another order."""
    old = read_manifest(dataset_path(run.data.corpus, "train"))
    shards = shards_of(old)
    first = shards[0].written.header
    rng = np.random.default_rng(1)
    with WindowWriter(
        tmp_path / "other",
        window_tokens=first.window_tokens,
        vocab_size=first.vocab_size,
        padding_id=first.padding_id,
    ) as writer:
        for number in range(first.num_windows):
            ids = rng.integers(0, first.vocab_size, size=first.window_tokens + 1)
            writer.add(ids, piece_lengths=[len(ids)], document_ids=[number], piece_offsets=[0])
        written = writer.finish()
    other = [replace(shards[0], path="other", written=written), *shards[1:]]
    write_manifest(tmp_path / "other.manifest", header=old.header, shards=other)
    changed = replace(
        run,
        data=replace(run.data, train=str(tmp_path / "other.manifest")),
        change=Change(reason="mended"),
    )
    with pytest.raises(CheckpointError, match="has other windows in buckets that the run reads"):
        follow(changed, saved)
