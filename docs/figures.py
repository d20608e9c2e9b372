"""Write every table of figures in README and docs/ from the JSON beside it.

    python docs/figures.py            # rewrite the tables
    python docs/figures.py --check    # exit 1 if a page differs from its JSON (a test calls this)

A table stands between `<!-- figures: NAME -->` and `<!-- end figures -->`; NAME.json in
docs/figures/ names the command and the commit that made it. Make the JSON anew with that command,
for instance `make run` and then
`cp runs/demo/summary.json docs/figures/demo.json`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from figure_tables import TABLES as GENERAL  # beside this file, which is run as a script
from planner_tables import PLANNER_TABLES

ROOT = Path(__file__).resolve().parents[1]
TABLES = {**GENERAL, **PLANNER_TABLES}
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end figures -->)", re.DOTALL)


def rendered(text: str) -> str:
    """Return a page with every table made anew from its JSON."""

    def replace(block: re.Match[str]) -> str:
        name = block.group(2)
        record = json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text("utf-8"))
        made_by = f"`{record['command']}` at commit {record['commit']}.\n"
        return f"{block.group(1)}{TABLES[name](record)}\n{made_by}{block.group(3)}"

    return BLOCK.sub(replace, text)


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        if new == text:
            continue
        stale += 1
        print(f"{page.relative_to(ROOT)}: {'differs from its JSON' if check else 'written'}")
        if not check:
            page.write_text(new, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
