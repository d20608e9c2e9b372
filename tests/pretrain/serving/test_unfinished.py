"""A conversion that was killed goes on, another one begins anew, and nothing is overwritten."""

from pathlib import Path

import pytest

from pretrain.serving.unfinished import PLAN_NAME, open_unfinished, publish_folder

PLAN = {"step": 3, "files": {"a": [1, 2]}, "from": Path("somewhere")}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "below" / "model"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_stands_beside_the_output_and_holds_the_plan_alone(output: Path) -> None:
    folder, was_begun = open_unfinished(output, PLAN)
    assert not was_begun
    assert folder.parent == output.parent
    assert names(folder) == {PLAN_NAME}
    assert not output.exists()


def test_the_same_plan_keeps_whole_files_and_removes_parts(output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "whole").write_text("1")
    (folder / ".tmp-part").write_text("2")
    again = open_unfinished(output, dict(reversed(PLAN.items())))  # keys have no order
    assert again == (folder, True)
    assert names(folder) == {PLAN_NAME, "whole"}
    assert (folder / "whole").read_text() == "1"


@pytest.mark.parametrize(
    "other",
    [PLAN | {"step": 4}, PLAN | {"files": {"a": [2, 1]}}, PLAN | {"more": None}, {}],
    ids=["value", "order of a list", "key", "empty"],
)
def test_another_plan_begins_anew(other: dict[str, object], output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "below").mkdir()
    (folder / "below" / "whole").touch()
    assert open_unfinished(output, other) == (folder, False)
    assert names(folder) == {PLAN_NAME}
    assert open_unfinished(output, other) == (folder, True)
    assert open_unfinished(output, PLAN) == (folder, False)


@pytest.mark.parametrize("plan_file", [None, "{}", "{"])
def test_a_folder_whose_plan_cannot_be_read_begins_anew(
    plan_file: str | None, output: Path
) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "whole").touch()
    (folder / PLAN_NAME).unlink()
    if plan_file is not None:
        (folder / PLAN_NAME).write_text(plan_file)
    assert open_unfinished(output, PLAN) == (folder, False)
    assert names(folder) == {PLAN_NAME}


def test_outputs_side_by_side_do_not_meet(output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    other, _ = open_unfinished(output.with_name("model2"), {})
    assert other != folder
    assert open_unfinished(output, PLAN) == (folder, True)


def test_the_result_has_its_name_and_no_plan(output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "whole").write_text("1")
    publish_folder(folder, output)
    assert names(output) == {"whole"}
    assert names(output.parent) == {"model"}


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_there_is_never_overwritten(kind: str, output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "whole").write_text("ours")
    if kind == "file":
        output.write_text("theirs")
    else:
        output.mkdir()
    if kind == "folder":
        (output / "whole").write_text("theirs")
    before = output.read_text() if kind == "file" else names(output)
    with pytest.raises(FileExistsError, match="has come into being meanwhile"):
        publish_folder(folder, output)
    assert before == (output.read_text() if kind == "file" else names(output))
    assert (folder / "whole").read_text() == "ours"


def test_a_refused_result_can_be_published_once_the_place_is_free(output: Path) -> None:
    folder, _ = open_unfinished(output, PLAN)
    (folder / "whole").write_text("ours")
    output.mkdir()
    with pytest.raises(FileExistsError):
        publish_folder(folder, output)
    output.rmdir()
    assert open_unfinished(output, PLAN) == (folder, True)
    publish_folder(folder, output)
    assert names(output) == {"whole"}
