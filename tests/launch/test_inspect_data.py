"""What a run reads, has read or would read is seen by one command."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.corpus.manifest import dataset_path
from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig
from data.indexed.dataset import open_dataset
from tests.data.indexed.shards import flip
from tests.launch.conftest import Inspect


def test_the_plan_of_the_report_is_shown_by_stage(inspect: Inspect, tmp_path: Path) -> None:
    code, text, _ = inspect(f"output={tmp_path / 'plan.json'}")
    assert code == 0
    assert text.count("64 yes, 96 yes") == 5
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens"] == pytest.approx(9.26e12, rel=1e-4)  # report section 4
    assert [stage["window_tokens"] for stage in plan["stages"]] == [4096, 4096, 4096, 16384, 32768]
    # report section 5, divided by the column's sum
    assert plan["stages"][0]["domains"]["web"] == pytest.approx(53.41 / 99.85, abs=1e-5)
    assert plan["stages"][1]["domains"]["code"] == pytest.approx(29.42 / 99.08, abs=1e-5)
    assert plan["stages"][4]["domains"]["stem"] == pytest.approx(9.07 / 99.12, abs=1e-5)


def test_later_stages_take_more_of_the_best_and_the_hardest(
    inspect: Inspect, tmp_path: Path
) -> None:
    inspect(f"output={tmp_path / 'plan.json'}")
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    for label in ("quality", "difficulty"):
        best = [stage[label]["2"] for stage in stages[:3]]
        assert best == sorted(best)


def test_addresses_are_the_same_for_any_number_of_replicas(
    inspect: Inspect, tmp_path: Path
) -> None:
    found: list[list[tuple[int, ...]]] = []
    for ranks in (64, 96):
        path = tmp_path / f"{ranks}.npz"
        code, text, _ = inspect(
            "action=addresses", "steps=30000:30001", f"ranks={ranks}", f"output={path}"
        )
        assert code == 0
        assert "15,360 slots" in text
        with np.load(path, allow_pickle=False) as table:
            rows = zip(*(table[key].tolist() for key in ("slot", "bucket", "window")), strict=True)
            found.append(sorted(rows))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["action=read"], "action: got 'read'"),
        (["steps=5:5"], "steps=5:5 given; first:last"),
        (["action=addresses", "steps=0:200000"], "0:156752 is allowed"),
        (["action=addresses", "ranks=7"], "ranks=7 * micro_batch=1 must divide them"),
        (["action=audit", "ranks=7"], "ranks=7 * micro_batch=1 must divide them"),
        (["action=explain", "step=1"], "described corpus, which has no text yet: give run="),
        (["action=verify"], "described corpus, which has no text yet: give run="),
        (["action=explain", "corpus=a"], "step=None, sample=None given; one of the two"),
        (["run=a", "corpus=b"], "run=a, corpus=b given; one of them is allowed"),
        (["dataset=a"], "dataset=a given with action=plan; it is allowed with action=verify"),
        (["action=verify", "dataset=/nope/x.set"], "/nope/x.set: No such file"),
        (["run=/nope"], "there is no /nope/config.yaml"),
        (["corpus=/nope"], "holds no finished corpus"),
        (["ranks=0"], "ranks=0, micro_batch=None"),
        (["described.domains.reasoning=1000000000"], "reasoning/"),
        (["curriculum.stages.general.tokens=0"], "curriculum.stages.general: tokens=0"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, inspect: Inspect) -> None:
    code, _, error = inspect(*words)
    assert code == 2
    assert said in error


# --- a prepared corpus ----------------------------------------------------------------------------

PLAIN = (
    "curriculum=plain",
    "curriculum.max_epochs=100",
    "curriculum.stages.all.window_tokens=32",
    "curriculum.stages.all.tokens=40960",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the text of each file of a source: short Korean ones, and long ones of numbers."""
    korean = {f"ko{n:02d}.txt": f"{n}: 안녕하세요, 서울은 {n * n}번째 봄입니다." for n in range(40)}
    numbers = {f"n{n:02d}.txt": " ".join(str(n * k) for k in range(9, 200)) for n in range(20)}
    return korean | numbers


@pytest.fixture(scope="module")
def corpus(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("prepared")
    for name, text in texts.items():
        (source / name).write_text(text, encoding="utf-8")
    config = PrepareConfig(
        output=str(folder),
        sources={
            "korean": SourceConfig(kind="text_folder", path=str(source), glob="ko*"),
            "numbers": SourceConfig(kind="text_folder", path=str(source), glob="n*"),
        },
        vocab_size=400,
        num_reserved=0,
        validation_fraction=0.1,
        window_tokens={"32": 1.0},
        validation_window_tokens=32,
    )
    prepare(config, progress=lambda *_: None)
    return folder


def test_the_text_explained_is_that_of_the_files_it_names(
    inspect: Inspect, corpus: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    with open_dataset(dataset_path(corpus, "train")) as dataset:
        num_windows = int(dataset.num_windows.sum())
    pieces: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    of_all = [f"corpus={corpus}", *PLAIN, f"curriculum.stages.all.global_sequences={num_windows}"]
    code, text, _ = inspect(
        "action=explain", *of_all, "step=0", "characters=20", f"output={tmp_path / 'all.json'}"
    )
    assert code == 0
    assert "'...\n" in text  # cut for people
    slots = json.loads((tmp_path / "all.json").read_text())
    for slot in slots:
        tokens = sum(piece["tokens"] for piece in slot["pieces"]) + slot["padding"]
        assert tokens == 33
        for piece in slot["pieces"]:
            pieces[piece["place"]][piece["offset"]] = piece
    # one stage in the proportions that the domains hold: the first epoch is nearly whole
    whole = 0
    for place, by_offset in pieces.items():
        found = [piece for _, piece in sorted(by_offset.items())]
        length = sum(piece["tokens"] for piece in found)
        if found[-1]["ends"] and found[-1]["offset"] + found[-1]["tokens"] == length:
            assert "".join(piece["text"] for piece in found) == texts[place]
            whole += 1
    assert whole > 40
    korean = next(slot for slot in slots if "안녕" in slot["pieces"][0]["text"])
    _, text, _ = inspect("action=explain", *of_all, f"sample={korean['sample']}")
    assert korean["pieces"][0]["place"] in text
    assert korean["pieces"][0]["text"] in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step=999999"], "step=999999 given; 0 .. "),
        (["step=0", "rank=2", "ranks=2"], "rank=2 given; 0 .. 1 is allowed"),
        (["step=0", "ranks=3"], "must divide it"),
        (["sample=999999999"], "sample=999999999 given; 0 .. "),
    ],
)
def test_a_slot_that_is_not_there_is_refused(
    words: list[str], said: str, inspect: Inspect, corpus: Path
) -> None:
    code, _, error = inspect("action=explain", f"corpus={corpus}", *PLAIN, *words)
    assert (code, said in error) == (2, True), error


def test_a_corpus_that_cannot_meet_the_curriculum_says_how_to_choose_another(
    inspect: Inspect, corpus: Path
) -> None:
    code, _, error = inspect(f"corpus={corpus}")
    assert code == 2
    assert "curriculum=NAME chooses another" in error


def test_replicas_that_are_simulated_take_each_window_once(
    inspect: Inspect, corpus: Path, tmp_path: Path
) -> None:
    simulated = ["action=audit", f"corpus={corpus}", *PLAIN, "steps=3:40", "ranks=2"]
    code, text, _ = inspect(*simulated, "micro_batch=2", f"output={tmp_path / 'audit.json'}")
    assert code == 0
    assert "steps 4 .. 40" in text
    assert "no difference" in text
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert sum(count["windows"] for count in audit["counts"]) == 37 * 8
    assert audit["repeated"] == 0


def test_verify_names_the_file_and_the_window_of_a_flipped_bit(
    inspect: Inspect, corpus: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    code, text, _ = inspect("action=verify", f"corpus={own}")
    assert (code, "whole: all files of 4 shards" in text) == (0, True)

    flip(own / "train" / "numbers.32.0.bin", 8 * (5 * 33 * 2 + 7))  # 33 ids of two bytes
    flip(own / "validation" / "korean.32.0.idx", 300)
    code, _, error = inspect("action=verify", f"corpus={own}", f"output={tmp_path / 'v.json'}")
    assert code == 2
    assert "2 of 12 files are damaged" in error
    assert f"{own}/train/numbers.32.0.bin: window 5 (bytes 330 .. 396)" in error
    assert f"{own}/validation/korean.32.0.idx: " in error
    assert "korean.32.0.bin" not in error
    damaged = json.loads((tmp_path / "v.json").read_text())["damaged"]
    assert [len(one["windows"]) for one in damaged] == [1, 0]

    code, _, error = inspect("action=verify", f"dataset={dataset_path(own, 'train')}")
    assert (code, "1 of 6 files are damaged" in error) == (2, True)
