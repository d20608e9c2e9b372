"""Every fault that docs/reliability.md speaks of has a test that exists, or a reason."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| (\d+) \| (.+?) \| (.+?) \|$", PAGE.partition("## Every kind of fault")[2], re.M
)


def test_the_table_has_all_49_rows() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 50))


@pytest.mark.parametrize(("number", "fault", "shown"), ROWS, ids=[row[0] for row in ROWS])
def test_a_fault_is_shown_by_tests_that_exist_or_has_a_reason(
    number: str, fault: str, shown: str
) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
    reasons = ("not built", "as 19", "needs a second host", "`make chaos`")
    assert named or any(reason in shown for reason in reasons), shown
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), (path, name)
