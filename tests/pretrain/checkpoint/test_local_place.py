"""Where a rank keeps its own checkpoints, and who else may have a hand in it."""

import os
import stat
from pathlib import Path

import pytest

from pretrain.checkpoint.local_place import (
    IDENTITY_NAME,
    LocalPlace,
    LocalTier,
    make_identity,
    read_identity,
)


def place_in(
    tmp_path: Path, *, rank: int = 0, identity: str = "aa", run: str = "run", node: str = "node01"
) -> LocalPlace:
    return LocalPlace(
        folder=tmp_path / "node",
        run_folder=tmp_path / "runs" / run,
        identity=identity,
        rank=rank,
        node=node,
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": Path("scratch"), "interval_steps": 1}, "folder=scratch given.*absolute"),
        ({"folder": Path("/scratch")}, "interval_steps=0 given, allowed: 1 or more"),
        ({"folder": Path("/scratch"), "interval_steps": -1}, "interval_steps=-1 given"),
        ({"interval_steps": -1}, "interval_steps=-1 given"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_key(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoints\.local\.{said}"):
        LocalTier(**given)  # type: ignore[arg-type]  what a user could write


def test_folders_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    before = os.umask(0)
    try:
        place.make()
        place.make()  # again
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "node", *(tmp_path / "node").rglob("*"))]
    assert place.root in made
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


def test_what_is_above_the_folder_is_not_made(tmp_path: Path) -> None:
    """A disk that is not mounted is not replaced by the one below it."""
    place = LocalPlace(
        folder=tmp_path / "nvme" / "mine", run_folder=tmp_path, identity="aa", rank=0, node="n"
    )
    with pytest.raises(FileNotFoundError):
        place.make()


@pytest.mark.parametrize("level", ["folder", "of_run"])
@pytest.mark.parametrize("how", ["open", "group", "link", "file", "stranger"])
def test_a_folder_that_could_be_somebody_elses_is_refused(
    level: str, how: str, tmp_path: Path
) -> None:
    place = place_in(tmp_path)
    path: Path = getattr(place, level)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (tmp_path / "other").mkdir(mode=0o700)
    said = {"open": "mode 777", "group": "mode 770", "stranger": "belongs to user 12345"}
    if how == "link":
        path.symlink_to(tmp_path / "other")
    elif how == "file":
        path.touch()
    else:
        path.mkdir()
        path.chmod({"open": 0o777, "group": 0o770}.get(how, 0o700))
    if how == "stranger":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(path, 12345, 12345)
    with pytest.raises((ValueError, FileExistsError), match=said.get(how, str(path))):
        place.make()


def test_runs_of_one_name_in_two_places_do_not_meet(tmp_path: Path) -> None:
    one, other = place_in(tmp_path / "a"), place_in(tmp_path / "b")
    assert one.of_run.name != other.of_run.name
    assert one.of_run.name.startswith("run-")
    assert place_in(tmp_path, run="sweep/job").of_run.parent == tmp_path / "node"


def test_an_identity_is_drawn_once_and_goes_with_the_shared_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert read_identity(root) == ""
    first = make_identity(root)
    assert first == make_identity(root) == read_identity(root)
    assert [path.name for path in root.iterdir()] == [IDENTITY_NAME]
    os.rename(tmp_path / "run", tmp_path / "run.1")
    assert make_identity(root) != first
    assert read_identity(tmp_path / "run.1" / "checkpoints") == first


def test_what_others_have_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    old, other_run = place_in(tmp_path, identity="bb"), place_in(tmp_path, run="another")
    ranks = [place_in(tmp_path, rank=rank) for rank in range(4)]
    for place in (old, other_run, *ranks):
        place.make()
    ranks[1].remove_strangers([1, 2])
    there = [place.root.exists() for place in (old, other_run, *ranks)]
    assert there == [False, True, False, True, True, False]


def test_nodes_that_see_one_disk_leave_each_other_alone(tmp_path: Path) -> None:
    """As where the folder is on shared storage by mistake."""
    one, other = place_in(tmp_path, rank=0), place_in(tmp_path, rank=1, node="node02")
    for place in (one, other):
        place.make()
    one.remove_strangers([0])
    other.remove_strangers([1])
    assert [one.root.exists(), other.root.exists()] == [True, True]


@pytest.mark.parametrize("text", ["", "..", "/home/me/runs", "0123456789abcdeg", "0" * 17])
def test_an_identity_that_nobody_has_drawn_is_no_part_of_a_path(text: str, tmp_path: Path) -> None:
    (tmp_path / IDENTITY_NAME).write_text(text, encoding="ascii")
    with pytest.raises(ValueError, match="16 hexadecimal digits are allowed"):
        make_identity(tmp_path)


def test_the_last_rank_that_leaves_takes_the_folder_of_the_run_along(tmp_path: Path) -> None:
    ranks = [place_in(tmp_path, rank=rank) for rank in range(2)]
    for place in ranks:
        place.make()
    ranks[0].remove()
    assert ranks[1].root.exists()
    ranks[1].remove()
    assert list((tmp_path / "node").iterdir()) == []
