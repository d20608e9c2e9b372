"""Is a run kept out of folders where somebody else could put a checkpoint?"""

import logging
import os
from pathlib import Path

import pytest

from pretrain.training.folders import check_folders, check_given


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of runs with one run and its checkpoints, all 0750."""
    for path in (tmp_path / "runs" / "t" / "checkpoints" / "step_00000001").parents:
        if path.is_relative_to(tmp_path / "runs"):
            path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "t" / "checkpoints" / "step_00000001").mkdir()
    for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]:
        path.chmod(0o750)
    return tmp_path / "runs"


def test_folders_of_ones_own_pass_without_a_word(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.parent.chmod(0o700)
    check_folders(root, root / "t")
    check_folders(root, root / "not" / "yet")
    check_folders(root / "absent", root / "absent" / "t")
    assert caplog.text == ""


@pytest.mark.parametrize("below", [".", "t", "t/checkpoints", "t/checkpoints/step_00000001"])
def test_a_folder_of_the_run_that_everybody_may_write_into_is_refused(
    root: Path, below: str
) -> None:
    path = root / below
    path.chmod(0o777)
    with pytest.raises(ValueError, match=r"output_root: .* is writable for everybody") as caught:
        check_folders(root, root / "t")
    assert f"chmod o-w {path}" in str(caught.value)


def test_the_folder_of_a_sweep_is_looked_at_too(root: Path) -> None:
    (root / "first").mkdir()
    (root / "first" / "lr=1").mkdir()
    (root / "first").chmod(0o757)
    with pytest.raises(ValueError, match="first is writable for everybody"):
        check_folders(root, root / "first" / "lr=1")


def test_a_sticky_folder_of_runs_passes_if_the_run_is_ones_own(root: Path) -> None:
    root.chmod(0o1777)
    check_folders(root, root / "t")


def test_a_run_that_somebody_else_put_into_a_sticky_folder_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.chmod(0o1777)
    if os.getuid() == 0:
        os.chown(root / "t", 12345, -1)
    else:  # the same with the roles exchanged: this process takes itself for another user
        monkeypatch.setattr("os.getuid", lambda: os.stat(root).st_uid + 1)
    with pytest.raises(ValueError, match=r"t belongs to user \d+ and stands in a folder"):
        check_folders(root, root / "t")


def test_a_folder_above_that_everybody_may_write_into_is_warned_of(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.parent.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        check_folders(root, root / "t")
    assert f"{root.parent} is writable for everybody (mode 777)" in caplog.text


def test_weights_from_a_folder_that_everybody_may_write_into_are_refused(root: Path) -> None:
    folder = root / "t" / "checkpoints" / "step_00000001"
    check_given(folder, key="initial_weights")
    folder.chmod(0o777)
    with pytest.raises(ValueError, match=r"^initial_weights: .* is writable for everybody"):
        check_given(folder, key="initial_weights")
