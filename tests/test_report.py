"""Do the configurations hold the report's numbers as docs/report.md states them?"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from pretrain.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
KEY = re.compile(
    r"(?:model|layout|optimizer|lr_schedule|curriculum|precision|mtp_loss_weight)[\w.]*"
)


def rows() -> list[tuple[str, str]]:
    """Return (key, value) of each table row that claims to be tested here."""
    found: list[tuple[str, str]] = []
    for line in (ROOT / "docs" / "report.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[4] == "[1]":
            found.append((cells[2], cells[1]))
    return found


def keys_named() -> set[str]:
    """Return every configuration key that the page's tables name."""
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    cells = [
        cell.strip()
        for line in text.splitlines()
        if line.startswith("|")
        for cell in line.split("|")
    ]
    names = [name.strip() for cell in cells for name in cell.split(",")]
    return {name for name in names if KEY.fullmatch(name)}


@pytest.fixture(scope="module")
def full_run() -> Run:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build(Run, compose("pretrain", ["+cluster=h200_1536"]))


def value_at(run: Run, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        if isinstance(value, dict):
            value = value[name]
            continue
        assert is_dataclass(value), key
        assert name in {field.name for field in fields(value)}, (
            f"docs/report.md names {key}, conf has no such key"
        )
        value = getattr(value, name)
    return value


def test_the_page_has_rows_to_check() -> None:
    assert len(rows()) > 20


@pytest.mark.parametrize(("key", "stated"), rows())
def test_a_configured_number_is_the_reports(full_run: Run, key: str, stated: str) -> None:
    assert value_at(full_run, key) == float(stated.replace(",", ""))


@pytest.mark.parametrize("key", sorted(keys_named()))
def test_a_key_named_on_the_page_exists(full_run: Run, key: str) -> None:
    value_at(full_run, key)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("model.init_std", 0.006),
        ("mtp_loss_weight", 0.3),
        ("optimizer.beta1", 0.9),
        ("optimizer.beta2", 0.95),
        ("optimizer.weight_decay", 0.1),
        ("optimizer.clip_norm", 1.0),
        ("optimizer.lr", 2.2e-4),
        ("lr_schedule.warmup_tokens", 2000 * 15360 * 4096),
        ("lr_schedule.decay_tokens", 1.66e12),
        ("lr_schedule.final_ratio", 0.1),
        ("curriculum.stages.general.global_sequences", 15360),
        ("curriculum.stages.general.tokens", 7e12),
        ("load_balance.aux_loss_coefficient", 1e-4),
    ],
)
def test_where_the_report_is_silent_our_value_is_the_stated_one(
    full_run: Run, key: str, ours: float
) -> None:
    assert value_at(full_run, key) == ours
