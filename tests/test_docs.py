"""Does every command in README and docs/ compose, and every path they name exist?"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from launch.inspection import Inspection
from launch.job_names import jobs_of_sweep
from launch.slurm_options import Submission
from launch.submission import split_words
from pretrain.serving.request import Generation
from pretrain.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGET = re.compile(r"^([a-z-]+):.*##", re.MULTILINE)
HYDRA_FLAGS = ("-m", "--multirun", "--cfg")


def commands() -> list[tuple[str, str]]:
    """Return (page, line) of every command in a shell block."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        blocks = re.findall(
            r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        )
        lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
        found += [(page.name, line) for line in lines if line and not line.startswith("#")]
    return found


def overrides_of(words: list[str], launch_file: str) -> list[str]:
    words = words[words.index(launch_file) + 1 :]
    if words[:1] == ["--cfg"]:
        words = words[2:]
    # a sweep's first value stands for all; a list is no sweep
    return [word.split(",")[0] if "," in word and not set("'\"[") & set(word) else word
            for word in words if word not in HYDRA_FLAGS]  # fmt: skip


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_in_the_docs_works(page: str, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True)]
    launched = next((word for word in words if word.startswith("launch/")), None)
    if words[0] == "make":
        targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
        assert words[1:2] == [] or words[1] in targets, f"{page}: make has no target {words[1]}"
    elif launched is not None:
        assert (ROOT / launched).is_file(), f"{page}: {launched} does not exist"
        config = Path(launched).stem
        if config == "submit":
            own, given = split_words(words[words.index(launched) + 1 :])
            with initialize_config_dir(str(ROOT / "conf"), version_base=None):
                asked = build(Submission, compose("submit", own))
                jobs_of = jobs_of_sweep if asked.job == "sweep" else lambda all_: [("", all_)]
                for _, one in jobs_of(given):
                    build(Run, compose("pretrain", one))
            return
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            cfg = compose(config, overrides_of(words, launched))
            if config == "pretrain":
                build(Run, cfg)
            if config == "inspect_data":
                build(Inspection, cfg)
            if config == "generate" and not cfg.prompt_file:
                build(Generation, cfg)
    else:
        script = next((word for word in words if word.startswith(("tests/", "docs/"))), None)
        known = words[0] in ("git", "cd", "pip", "wandb", "python", ".venv/bin/python", "source",
                             "squeue", "scancel", "tail", "touch")  # fmt: skip
        assert known, f"{page}: nobody has tried `{line}`"
        assert script is None or (ROOT / script).exists(), f"{page}: {script} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_linked_from_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_every_page_is_reached_from_the_readme_or_the_house() -> None:
    reached = "".join(
        page.read_text(encoding="utf-8")
        for page in (ROOT / "README.md", ROOT / "docs" / "house.md")
    )
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if name not in reached] == []


def test_every_table_of_figures_is_what_its_json_says() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "figures.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, f"{checked.stdout}run `make figures`"
