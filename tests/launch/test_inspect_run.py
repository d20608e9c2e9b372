"""What a real run has read is audited, explained and planned from what it left behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.corpus.manifest import dataset_path
from data.indexed.dataset import open_dataset
from data.stream.curriculum import Curriculum, Stage
from data.stream.ledger import Entry, Ledger, read_ledger, write_ledger
from data.stream.loader import BatchReader, Reading, Share
from data.tokenizer.codec import Codec
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training.change import Change
from tests.launch.conftest import Inspect
from tests.launch.short_runs import train_some


@pytest.fixture(scope="module")
def runs(tiny_run: Any, two_ranks: RankPool) -> tuple[Path, Path]:
    """Return the folders of two runs of two stages on two replicas.

    The first went to its end. The second was saved after step 3 and killed after step 5; then it
    went on, and left two batches out.
    """
    curriculum = Curriculum(
        stages={
            "short": Stage(tokens=6 * 8 * 64, window_tokens=64, global_sequences=8),
            "long": Stage(tokens=4 * 4 * 128, window_tokens=128, global_sequences=4),
        },
        max_epochs=100.0,
    )
    finished, left = (
        tiny_run(
            Layout(num_ranks=2),
            name=name,
            curriculum=curriculum,
            micro_batch_tokens=128,
            telemetry=TelemetryConfig(wandb="disabled", console_interval_steps=2),
        )
        for name in ("finished", "left")
    )
    two_ranks.run(train_some, finished)
    two_ranks.run(train_some, left, save_after=3, leave_after=5)
    changed = replace(left, change=Change(reason="spikes", skip=("4:6",)))
    two_ranks.run(train_some, changed)
    return finished.folder, left.folder


@pytest.fixture
def own_runs(runs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return copies that a test may damage."""
    copies = [
        Path(shutil.copytree(run, tmp_path / run.name, ignore=lambda *_: ["checkpoints"]))
        for run in runs
    ]
    return copies[0], copies[1]


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change the records of a metrics.jsonl, or leave them out."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [new for record in records if (new := change(record)) is not None]
    path.write_text("".join(json.dumps(record) + "\n" for record in changed))


def test_a_finished_run_and_one_that_was_killed_and_went_on_pass_the_audit(
    inspect: Inspect, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for run_folder, steps, windows in zip(runs, (10, 8), (64, 48), strict=True):
        path = tmp_path / "audit.json"
        code, text, _ = inspect("action=audit", f"run={run_folder}", f"output={path}")
        assert code == 0, text
        assert f"steps 1 .. {steps}" in text
        audit = json.loads(path.read_text())
        assert sum(count["windows"] for count in audit["counts"]) == windows
        assert {count["stage"] for count in audit["counts"]} == {"short", "long"}
    assert "skip  spikes" in text
    assert [entry["kind"] for entry in audit["ledger"]] == ["plan", "skip"]


def other_seed(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1\n", "seed: 2\n"))


def other_digest(record: dict[str, Any]) -> dict[str, Any]:
    if record["step"] == 4 and "consumed" in record:
        return {**record, "consumed": f"{int(record['consumed'], 16) ^ 1:016x}"}
    return record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_digest, "steps 3 .. 4: "),
        (lambda record: None if record["step"] == 4 else record, "steps 3 .. 4: no digest"),
        (lambda record: None if record["step"] == 3 else record, "step 3: no step is recorded"),
        (lambda record: None if record["step"] == 10 else record, "step 10: no"),
        (
            lambda record: {**record, "stage": "long"} if record["step"] == 2 else record,
            "step 2: stage=long is recorded, the ledger says short",
        ),
        (lambda record: {**record, "tokens": 64}, "step 1: tokens=64 is recorded"),
        (
            lambda record: {**record, "consumed_from_step": 1} if record["step"] == 4 else record,
            "step 2: two digests are recorded",
        ),
        (lambda record: {**record, "step": record["step"] + 1}, "the run has 10 steps"),
        (
            lambda record: {**record, "consumed": "?"} if record["step"] == 4 else record,
            "step 4: consumed=? is no digest",
        ),
        (lambda _: None, "no step is recorded"),
    ],
    ids=[
        "digest", "interval", "step", "end", "stage", "tokens", "overlap", "shift", "text", "none"
    ],
)  # fmt: skip
def test_a_record_that_was_changed_fails_the_audit(
    change: Callable[[dict[str, Any]], dict[str, Any] | None],
    said: str,
    inspect: Inspect,
    own_runs: tuple[Path, Path],
) -> None:
    rewrite(own_runs[0] / "metrics.jsonl", change)
    code, text, _ = inspect("action=audit", f"run={own_runs[0]}")
    assert code == 1
    assert said in text, text


def test_a_ledger_that_was_changed_fails_the_audit(
    inspect: Inspect, own_runs: tuple[Path, Path]
) -> None:
    path = own_runs[1] / "ledger.jsonl"
    path.write_text(path.read_text().replace("spikes", "spiked"))
    code, text, _ = inspect("action=audit", f"run={own_runs[1]}")
    assert (code, "entry 1 was changed" in text) == (1, True)


def test_a_ledger_that_was_written_anew_fails_the_audit(
    inspect: Inspect, own_runs: tuple[Path, Path]
) -> None:
    path = own_runs[1] / "ledger.jsonl"
    plan, skip = read_ledger(path).entries
    write_ledger(path, Ledger((plan, replace(skip, first_batch=5, num_batches=2))))
    code, text, _ = inspect("action=audit", f"run={own_runs[1]}")
    assert code == 1
    assert "was read (attempt 2), the ledger says" in text


def test_a_run_of_another_seed_fails_the_audit(
    inspect: Inspect, own_runs: tuple[Path, Path]
) -> None:
    other_seed(own_runs[0])
    code, text, _ = inspect("action=audit", f"run={own_runs[0]}")
    assert code == 1
    assert text.count("was read (attempt 1)") == 5


def test_a_run_under_way_may_have_steps_without_a_digest(
    inspect: Inspect, own_runs: tuple[Path, Path]
) -> None:
    (own_runs[0] / "exit.json").unlink()
    rewrite(own_runs[0] / "metrics.jsonl", lambda r: None if r["step"] > 5 else r)
    code, text, _ = inspect("action=audit", f"run={own_runs[0]}")
    assert (code, "step 5: no digest is recorded yet" in text) == (0, True), text


def test_each_rank_is_shown_what_training_reads_on_it(
    inspect: Inspect, runs: tuple[Path, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    codec = Codec(tiny_corpus / "tokenizer.json")
    ledger = read_ledger(runs[1] / "ledger.jsonl")
    names = [bucket.name for bucket in ledger.last_plan.buckets]
    with open_dataset(dataset_path(tiny_corpus, "train")) as dataset:
        for step, rank in ((2, 0), (2, 1), (5, 0), (5, 1)):
            path = tmp_path / "slots.json"
            words = [f"run={runs[1]}", f"step={step}", f"rank={rank}", f"output={path}"]
            assert inspect("action=explain", *words)[0] == 0
            shown = json.loads(path.read_text())
            share = Share(replicas=2, replica=rank, micro_batch_tokens=128)
            with BatchReader(dataset, ledger, seed=1, share=share, reading=Reading()) as reader:
                read = reader.read(step)
                assert {slot["batch"] for slot in shown} == {read.batch}
                for slot, tokens, bucket in zip(
                    shown, read.windows.tokens, read.addresses.bucket, strict=True
                ):
                    assert slot["bucket"] == names[bucket]
                    text = "".join(
                        piece["text"] + "<|endoftext|>" * piece["ends"] for piece in slot["pieces"]
                    )
                    padding = "<|endoftext|>" * slot["padding"]
                    assert text + padding == codec.decode(tokens)


def test_plan_and_addresses_of_a_run_are_its_ledgers(
    inspect: Inspect, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    code, text, _ = inspect("action=plan", f"run={runs[1]}", f"output={tmp_path / 'plan.json'}")
    assert code == 0
    assert "skipped, and counted above: batches 4 .. 5" in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["divides"] for stage in plan["stages"]] == [{"2": True}, {"2": True}]
    code, text, _ = inspect(
        "action=addresses", f"run={runs[1]}", "steps=3:5", f"output={tmp_path / 'a.json'}"
    )
    assert code == 0
    table = json.loads((tmp_path / "a.json").read_text())
    assert sorted(set(zip(table["step"], table["batch"], strict=True))) == [(3, 3), (4, 6)]
    assert set(table["rank"]) == {0, 1}


def test_a_window_that_is_replaced_is_shown_with_what_is_read_instead(
    inspect: Inspect, own_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = ["action=explain", f"run={own_runs[0]}", "sample=3", f"output={tmp_path / 's.json'}"]
    assert inspect(*asked)[0] == 0
    (before,) = json.loads((tmp_path / "s.json").read_text())
    ledger = read_ledger(own_runs[0] / "ledger.jsonl")
    bucket = [one.name for one in ledger.last_plan.buckets].index(before["bucket"])
    damaged = Entry(
        kind="replace", first_batch=0, bucket=bucket, window=before["window"], reason="bad disk"
    )
    write_ledger(own_runs[0] / "ledger.jsonl", ledger.with_entry(damaged))

    code, text, _ = inspect(*asked)

    assert (code, "(damaged; another is read)" in text) == (0, True)
    (after,) = json.loads((tmp_path / "s.json").read_text())
    assert after["window"] == before["window"]
    assert after["pieces"] != before["pieces"]
    assert inspect("action=audit", f"run={own_runs[0]}")[0] == 0


def test_the_windows_of_a_run_are_verified(inspect: Inspect, runs: tuple[Path, Path]) -> None:
    code, text, _ = inspect("action=verify", f"run={runs[0]}")
    assert (code, "whole: all files of 6 shards" in text) == (0, True), text
