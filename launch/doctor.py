"""Say what this machine has, what a run would use of it, and what each missing piece costs.

    python launch/doctor.py                                  # tables; about ten seconds
    python launch/doctor.py output=doctor.json               # the same as JSON, too
    python launch/doctor.py 'require=[fp8,nccl]'             # before a job: exit code 1 if not

Exit codes: 0 told, 1 something of `require` is missing (named), 2 wrong configuration.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, record_exit_code, run
from pretrain.training.doctor import Doctor, as_json, examine, missing_of
from pretrain.training.doctor_table import as_text


@hydra.main(version_base=None, config_path="../conf", config_name="doctor")
def main(cfg: Composed) -> None:
    """Look at the machine and say what was found."""
    options = build(Doctor, cfg)
    report = examine(options)
    print(as_text(report))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(as_json(report), encoding="utf-8")
    if missing := missing_of(report, options.require):
        print("error: required and missing: " + "; ".join(missing), file=sys.stderr)
        record_exit_code(1)


if __name__ == "__main__":
    sys.exit(run(main))
