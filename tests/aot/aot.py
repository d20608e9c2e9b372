"""Do the kernels compile for H100 and H200 with no spilled register? Needs no GPU.

    make aot
    python tests/aot/aot.py --only dual_norm --json /tmp/aot.json

Exit code 1 if a kernel spills.

Source of the rule: what is spilled goes through memory, which these kernels exist to spare.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import triton  # noqa: E402

from tests.aot.cubin import Machine, machine_code  # noqa: E402
from tests.aot.shipped import SHIPPED  # noqa: E402
from tests.bench.provenance import parser, write_result  # noqa: E402

COLUMNS = ("registers", "spills", "stack_bytes", "shared_bytes", "wide", "narrow", "saturating")


def main(arguments: argparse.Namespace) -> int:
    """Compile, print one line for each launch, write the JSON; return the exit code."""
    rows: list[dict[str, object]] = []
    spilling: list[Machine] = []
    print(f"{'what':28} {'kernel':34} {'warps':>5} " + " ".join(f"{c:>12}" for c in COLUMNS))
    for name, call in SHIPPED.items():
        if arguments.only not in name:
            continue
        for machine in machine_code(call):
            row = machine.row()
            rows.append({"name": name, **row})
            spilling += [machine] if machine.spills or machine.stack_bytes else []
            print(f"{name:28} {machine.kernel:34} {machine.num_warps:5} "
                  + " ".join(f"{row[column]:12}" for column in COLUMNS), flush=True)  # fmt: skip
    write_result(arguments.json, triton=triton.__version__, target="sm_90a", rows=rows)
    for machine in spilling:
        print(
            f"{machine.kernel} spills: {machine.spills} loads and stores, {dict(machine.constants)}"
        )
    return 1 if spilling else 0


if __name__ == "__main__":
    words = parser(__doc__)
    words.add_argument("--only", default="", help="part of a name in tests/aot/shipped.py")
    sys.exit(main(words.parse_args()))
