"""Other packages or other code than a checkpoint's are found, by name, old and new."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import pytest

from kernels import native
from pretrain.checkpoint import environment
from pretrain.checkpoint.environment import (
    check_same_environment,
    code_commit,
    find_drift,
    running_versions,
)
from pretrain.checkpoint.manifest import CheckpointError, Manifest

ROOT = Path(__file__).resolve().parents[3]


def manifest(versions: dict[str, str]) -> Manifest:
    return Manifest(
        step=1,
        sequences=0,
        tokens=0,
        tokenizer_digest="",
        config={},
        versions=versions,
        files={},
    )


def test_what_is_recorded_is_what_the_packages_say_themselves() -> None:
    found = running_versions()
    assert found["python"] == platform.python_version()
    for name in ("torch", "megatron-core", "numpy"):
        assert found[name] == importlib.metadata.version(name)
    packages = {"torch", "megatron-core", "numpy", "transformer-engine"}
    assert set(found) == {"python", *packages, "code", "cpu operators"}


@pytest.mark.parametrize("is_there", [True, False])
def test_operators_of_another_compiler_are_a_drift(
    is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "version", lambda: "cc 13" if is_there else "torch")
    found = dict(running_versions.__wrapped__())
    saved = {**found, "cpu operators": "cc 12"}
    assert find_drift(saved, found) == {"cpu operators": ("cc 12", found["cpu operators"])}


def test_a_gpu_has_no_operators_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", lambda _: "2.9.0")
    assert "cpu operators" not in running_versions.__wrapped__()


def test_a_package_that_is_not_there_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package-at-all",))
    assert running_versions.__wrapped__()["no-such-package-at-all"] == "not installed"


def test_the_commit_is_gits_and_unknown_where_there_is_no_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    asked = subprocess.run(git, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        assert asked.stdout.startswith(code_commit().rstrip("+"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit() == "unknown"


def test_only_what_both_name_and_differs_is_a_drift() -> None:
    saved = {"torch": "2.12.0", "numpy": "2.0", "transformer-engine": "2.9", "gone": "1"}
    running = {"torch": "2.13.0", "numpy": "2.0", "transformer-engine": "not installed", "new": "1"}
    assert find_drift(saved, running) == {
        "gone": ("1", "not installed"),
        "torch": ("2.12.0", "2.13.0"),
        "transformer-engine": ("2.9", "not installed"),
    }
    assert find_drift({}, running) == {}  # a checkpoint that is older than the record


def test_a_strict_run_is_refused_with_everything_that_differs() -> None:
    check_same_environment(manifest(dict(running_versions())), folder=Path("step_00000001"))
    others = {**running_versions(), "torch": "1.0", "code": "abc"}
    with pytest.raises(CheckpointError) as refusal:
        check_same_environment(manifest(others), folder=Path("step_00000001"))
    said = str(refusal.value)
    assert f"torch 1.0 -> {running_versions()['torch']}" in said
    assert f"code abc -> {running_versions()['code']}" in said
    assert "on_other_environment=warn" in said
