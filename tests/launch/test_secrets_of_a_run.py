"""Does a real run write a secret into any of its files, or say it?

Secrets are planted where a user's could be: in the environment, in the password of a URL, in a word
of the command line, in the text of an error. Then every byte of every file is searched for them.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.monitor.incidents import Incident, read_incidents, record_incident
from pretrain.monitor.secrets import scrub
from pretrain.training.job import train
from pretrain.training.run import Run
from tests.launch.conftest import SMALL, STEP_TOKENS, TOKENS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEf",
    "CORPUS_DB_PASSWORD": "correct-horse-battery",
}
ON_THE_COMMAND_LINE = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
IN_THE_URL = "s3cr3t.of.a.url"
CANARIES = (*ENVIRONMENT.values(), ON_THE_COMMAND_LINE, IN_THE_URL)
_BLOCK_BYTES = 32 * 1024  # of wandb's file: a record is cut where a block ends


def files_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every file with its bytes, names of folders and links included, unpacked if packed."""
    for path in sorted(folder.rglob("*")):
        yield path, str(path.relative_to(folder)).encode()
        if path.is_symlink():
            yield path, os.readlink(path).encode()
        elif path.is_file():
            content = path.read_bytes()
            yield path, content
            if content[:2] == b"\x1f\x8b":
                yield path, gzip.decompress(content)


def leaks(folder: Path) -> set[str]:
    return {
        f"{path.relative_to(folder)}: {canary}"
        for path, content in files_below(folder)
        for canary in CANARIES
        if canary.encode() in content
    }


def launch(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    plain = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words],
        env={**plain, **ENVIRONMENT, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=180,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def finished(
    tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder of a run of two steps with every canary, and what it said."""
    folder = tmp_path_factory.mktemp("canaries")
    # fsspec reads file://user:password@place/x as the path user:password@place/x
    (folder / f"reader:{IN_THE_URL}@place").symlink_to(tiny_corpus / "train")
    words = [
        *SMALL,
        f"data.corpus={tiny_corpus}",
        f"data.train='file://reader:{IN_THE_URL}@place/dataset.manifest'",
        f"data.storage.cache_folder={folder / 'cache'}",
        "output_root=runs",
        "name=t",
        "layout=single",
        "telemetry.wandb=offline",
        f"{TOKENS}={2 * STEP_TOKENS}",
        f"change.reason='with token {ON_THE_COMMAND_LINE}'",
    ]
    return folder, launch(words, folder)


def test_a_run_with_secrets_reads_its_data_and_finishes(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    config = (folder / "runs" / "t" / "config.yaml").read_text(encoding="utf-8")
    assert "train: file://***@place/dataset.manifest" in config
    assert "reason: with token ***" in config


def test_no_file_of_a_run_holds_a_secret(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    (recorded,) = (folder / "runs" / "t").glob("wandb/offline-run-*/run-*.wandb")
    assert 1000 < recorded.stat().st_size < _BLOCK_BYTES
    names = {path.name for path, _ in files_below(folder / "runs")}
    assert {"config.yaml", "manifest.json", "summary.json", "exit.json", "debug.log"} <= names
    assert leaks(folder / "runs") == set()
    assert leaks(folder / "cache") == set()
    assert leaks(folder / "home") == set()


def test_nothing_that_a_run_says_holds_a_secret(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = finished
    assert [canary for canary in CANARIES if canary in done.stdout + done.stderr] == []


def test_digests_commits_and_numbers_of_a_run_are_left_alone(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder = finished[0] / "runs" / "t"
    (step,) = (folder / "checkpoints").glob("step_*")
    manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", manifest["tokenizer_digest"])
    assert all(re.fullmatch("[0-9a-f]{64}", f["sha256"]) for f in manifest["files"].values())
    commit = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["commit"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", commit)
    for name in ("metrics.jsonl", "attempts/00000001.json", "exit.json"):
        assert "***" not in (folder / name).read_text(encoding="utf-8"), name
    # what was planted in the configuration: URL, reason, and nothing else
    assert (folder / "config.yaml").read_text(encoding="utf-8").count("***") == 2
    assert json.dumps(manifest).count("***") == 2


def test_wandb_keeps_no_command_line_program_code_or_packages(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    (folder,) = (finished[0] / "runs" / "t" / "wandb").glob("offline-run-*")
    (recorded,) = folder.glob("run-*.wandb")
    content = recorded.read_bytes()
    assert b"hidden_size" in content  # the configuration is there
    words = (b"layout=single", b"launch/pretrain.py", sys.executable.encode(), b"setuptools")
    assert [word for word in words if word in content] == []
    kept = {p.name for p in folder.rglob("*") if p.is_file()}
    assert kept == {recorded.name, "debug.log", "debug-internal.log", "debug-core.log"}


def test_files_are_0640_and_folders_0750(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The umask of the test run is 022 on most machines; ranks and wandb's service inherit ours."""
    folder, _ = finished
    wide = {
        f"{path.relative_to(folder)}: {path.stat().st_mode & 0o777:o}"
        for path in (folder / "runs").rglob("*")
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    }
    assert wide == set()


def test_a_refusal_names_the_url_without_its_password(words: list[str], tmp_path: Path) -> None:
    done = launch(
        [*words, f"data.train='file://reader:{IN_THE_URL}@place/nowhere.manifest'"], tmp_path
    )
    assert done.returncode == 2
    assert "file://***@place/nowhere.manifest" in done.stderr
    assert leaks(tmp_path / "runs") == set()
    said = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert "file://***@place/nowhere.manifest" in said["reason"]
    assert IN_THE_URL not in done.stderr


def test_a_sweep_keeps_no_secret_of_its_words(words: list[str], tmp_path: Path) -> None:
    secret = f"change.reason={ON_THE_COMMAND_LINE}"
    done = launch(["-m", *words, "model.vocab_size=300,301", secret], tmp_path)
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "runs" / "t" / "multirun.yaml").is_file(), done.stderr
    assert leaks(tmp_path / "runs") == set()


def test_the_text_of_an_error_is_written_without_secrets(
    tiny_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise RuntimeError(f"login with {IN_THE_URL} at https://me:{IN_THE_URL}@host/ failed")

    monkeypatch.setenv("STORE_SECRET", IN_THE_URL)
    monkeypatch.setattr("pretrain.training.job.guard_tracebacks", lambda: None)
    monkeypatch.setattr("pretrain.training.job.groups.join_world", fail)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert train(replace(tiny_run(), output_root=tmp_path), "") == 1
    finally:
        for number, before in kept.items():
            signal.signal(number, before)
    said = capsys.readouterr().err
    assert "RuntimeError: login with *** at https://***@host/ failed" in said
    assert "Traceback" in said
    assert leaks(tmp_path) == set()
    assert "login with ***" in (tmp_path / "tiny" / "exit.json").read_text(encoding="utf-8")


def test_an_incident_is_written_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    incident = Incident(
        kind="data",
        text=f"no answer to {ENVIRONMENT['HF_TOKEN']}",
        detail={"url": f"s3://a:{IN_THE_URL}@b/c", "api_key": "12ab34cd", "files": ["x.bin"]},
    )
    record_incident(tmp_path, incident)
    (found,) = read_incidents(tmp_path)
    assert found["text"] == "no answer to ***"
    assert found["detail"] == {"url": "s3://***@b/c", "api_key": "***", "files": ["x.bin"]}
    assert ENVIRONMENT["HF_TOKEN"] not in scrub(caplog.text)
