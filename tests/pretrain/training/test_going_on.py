"""What a run that goes on is refused, what it writes down, and that a finished one writes nothing.

No rank is started: a checkpoint is a folder with a manifest, and what ranks would do is not asked.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.indexed.dataset_manifest import ShardEntry
from data.indexed.dataset_manifest import read_manifest as read_dataset
from data.indexed.dataset_manifest import write_manifest as write_dataset
from data.indexed.format import DataError
from data.indexed.shard_check import read_shard
from data.stream.ledger import write_ledger
from pretrain.checkpoint.environment import running_versions
from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    digest_file,
    read_manifest,
    step_folder,
    write_manifest,
)
from pretrain.monitor.incidents import read_incidents
from pretrain.training.change import Change
from pretrain.training.corpus import LEDGER_NAME, open_run_corpus
from pretrain.training.exit_file import FINISHED, write_exit
from pretrain.training.going_on import CHANGES_NAME, read_changes, record_going_on
from pretrain.training.run import AdamW, Run, as_json
from pretrain.training.start import start
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]
STEPS = 4


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks be started in name only."""
    monkeypatch.setattr("pretrain.training.start.run_ranks", lambda *_, **__: 99)


@pytest.fixture
def run(tiny_run: MakeRun, tmp_path: Path) -> Run:
    return tiny_run(curriculum=tiny_curriculum(STEPS * 8 * 64), output_root=tmp_path)


def save(run: Run, *, step: int, versions: dict[str, str] | None = None) -> Path:
    """Write what a run leaves: a checkpoint of one small file, its ledger, its exit code."""
    folder = step_folder(run.folder / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"weights")
    with open_run_corpus(run) as corpus:
        write_ledger(run.folder / LEDGER_NAME, corpus.ledger)
        manifest = Manifest(
            step=step,
            sequences=8 * step,
            tokens=512 * step,
            tokenizer_digest=corpus.manifest.tokenizer_digest,
            config=as_json(run),
            versions=running_versions() if versions is None else versions,
            files={"weights": digest_file(folder / "weights")},
            ledger=corpus.ledger.as_json(),
        )
    write_manifest(folder, manifest)
    write_exit(run.folder, code=75, reason="asked to stop", step=step)
    return folder


def slower(run: Run, *, allowed: bool) -> Run:
    change = Change(reason="spike at 3", allow=("optimizer.lr",)) if allowed else Change()
    return replace(run, optimizer=AdamW(lr=5e-4, bucket_parameters=20_000), change=change)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and time of the last change of every file but exit.json, and of every folder."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.name != "exit.json"
    }


@pytest.mark.parametrize("environment", ["warn", "refuse"])
def test_a_finished_run_that_is_started_again_changes_nothing_but_its_exit_file(
    environment: str, run: Run
) -> None:
    save(run, step=STEPS, versions={"torch": "1.0"})
    (run.folder / "summary.json").write_text(json.dumps({"step": STEPS}), encoding="utf-8")
    before = contents(run.folder)
    again = replace(run, on_other_environment=environment)
    assert start(again, config_yaml="", environment={}) == FINISHED
    assert contents(run.folder) == before
    record = json.loads((run.folder / "exit.json").read_text(encoding="utf-8"))
    assert (record["code"], record["reason"]) == (0, "was finished already")
    assert record["step"] == STEPS


@pytest.mark.parametrize("summary", ["", '{"step": 3}', '{"step": 4'])
def test_a_run_that_was_killed_before_its_last_word_is_started(summary: str, run: Run) -> None:
    """Its last step is saved; the last validation or its figures are missing, cut, or older."""
    save(run, step=STEPS)
    if summary:
        (run.folder / "summary.json").write_text(summary, encoding="utf-8")
    assert start(run, config_yaml="", environment={}) == 99


def test_a_run_with_steps_left_is_started(run: Run) -> None:
    save(run, step=STEPS - 1)
    assert start(run, config_yaml="", environment={}) == 99


def test_another_schedule_is_refused_unless_it_is_allowed(run: Run) -> None:
    save(run, step=2)
    with pytest.raises(CheckpointError, match=r"optimizer\.lr=0\.001, optimizer\.lr=0\.0005 given"):
        start(slower(run, allowed=False), config_yaml="", environment={})
    assert start(slower(run, allowed=True), config_yaml="", environment={}) == 99


def test_an_allowed_change_is_written_once_with_its_reason_and_is_then_the_runs_own(
    run: Run,
) -> None:
    changed = slower(run, allowed=True)
    folder = save(run, step=2)
    for _ in range(2):  # the second is a job that was queued again before it saved
        record_going_on(changed, read_manifest(folder))
    (line,) = read_changes(run.folder)
    assert (line["step"], line["tokens"], line["reason"]) == (2, 1024, "spike at 3")
    assert line["changes"] == {"optimizer.lr": {"old": 1e-3, "new": 5e-4}}

    later = save(changed, step=3)
    for again in (changed, slower(run, allowed=False)):
        assert start(again, config_yaml="", environment={}) == 99
        record_going_on(again, read_manifest(later))
    assert read_changes(run.folder) == [line]

    back = replace(run, change=Change(reason="spike is over", allow=("optimizer.lr",)))
    record_going_on(back, read_manifest(later))
    assert [entry["reason"] for entry in read_changes(run.folder)] == [
        "spike at 3",
        "spike is over",
    ]


def test_a_run_that_goes_on_as_it_was_writes_nothing_down(run: Run) -> None:
    record_going_on(run, read_manifest(save(run, step=2)))
    assert not (run.folder / CHANGES_NAME).exists()
    assert read_incidents(run.folder) == []


def test_another_environment_is_one_incident_and_one_warning(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(run, step=2, versions={**running_versions(), "torch": "1.0"})
    assert start(run, config_yaml="", environment={}) == 99
    record_going_on(run, read_manifest(folder))
    (incident,) = read_incidents(run.folder)
    assert (incident["kind"], incident["step"]) == ("environment", 2)
    now = running_versions()["torch"]
    assert incident["detail"] == {"torch": {"old": "1.0", "new": now}}
    (warning,) = [record for record in caplog.records if "torch 1.0 ->" in record.getMessage()]
    assert warning.levelname == "WARNING"


def test_another_environment_is_refused_where_the_user_asks_for_it(run: Run) -> None:
    save(run, step=2, versions={**running_versions(), "torch": "1.0"})
    strict = replace(run, on_other_environment="refuse")
    with pytest.raises(CheckpointError, match=r"torch 1\.0 -> .*on_other_environment=warn"):
        start(strict, config_yaml="", environment={})
    exit_file = json.loads((run.folder / "exit.json").read_text(encoding="utf-8"))
    assert exit_file["code"] == 2
    assert read_incidents(run.folder) == []


@pytest.mark.parametrize(("version", "said"), [(99, "use newer code"), (1, "the code that wrote")])
def test_a_checkpoint_of_another_schema_is_refused_and_stays_where_it_is(
    version: int, said: str, run: Run
) -> None:
    save(run, step=1)
    folder = save(run, step=2)
    write_manifest(folder, replace(read_manifest(folder), schema_version=version))
    with pytest.raises(CheckpointError, match=rf"step_00000002 has schema {version}, .*{said}"):
        start(run, config_yaml="", environment={})
    assert folder.is_dir()


def test_windows_of_another_tokenizer_are_refused_with_three_digests(
    run: Run, tmp_path: Path
) -> None:
    save(run, step=2)
    with open_run_corpus(run) as corpus:
        own = corpus.manifest.tokenizer_digest[:12]
        old = read_dataset(corpus.train.manifest.path)
        shards = [
            ShardEntry(
                path=str(old.prefix(number)),
                bucket=int(old.bucket[number]),
                written=read_shard(str(old.prefix(number))),
            )
            for number in range(old.num_shards)
        ]
    swapped = tmp_path / "swapped.manifest"
    header = replace(old.header, tokenizer_sha256="f" * 64)
    write_dataset(swapped, header=header, shards=shards)
    other = replace(run, data=replace(run.data, train=str(swapped)))
    with pytest.raises(DataError, match=r"swapped\.manifest .*learns noise") as refusal:
        start(other, config_yaml="", environment={})
    assert (
        f"tokenizers: {own} of the corpus, {'f' * 12} of its training windows, {own} of the"
        " checkpoint"
    ) in str(refusal.value)


def test_a_checkpoint_of_another_tokenizer_is_refused_with_three_digests(run: Run) -> None:
    folder = save(run, step=2)
    manifest = read_manifest(folder)
    own = manifest.tokenizer_digest[:12]
    write_manifest(folder, replace(manifest, tokenizer_digest="f" * 64))
    with pytest.raises(CheckpointError) as refusal:
        start(run, config_yaml="", environment={})
    assert (
        f"tokenizers: {own} of the corpus, {own} of its training windows, {'f' * 12} of the"
        " checkpoint"
    ) in str(refusal.value)
