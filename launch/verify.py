"""Check on this machine that every layout trains the same model, whatever its options.

    python launch/verify.py ranks=2
    python launch/verify.py ranks=8 json=runs/verify/matrix.json
    python launch/verify.py ranks=4 only=tp2
    python launch/verify.py ranks=4 what=options

A small model with everything on (MLA, dual norm, grouped routing, shared expert, MTP, auxiliary
loss, router bias) takes a few steps under every factorisation of the ranks, and under a pairwise
cover of schedule, dispatcher, recomputation, overlap, load balance, precision and micro-batch size.
Losses, the global gradient norm, every gradient, every token's experts and every weight are
compared with one rank's, which is itself compared with transformers. Exit code 1 if any differs. A
second start goes on where the first was stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, record_exit_code, run
from parallel.spawn import find_function
from pretrain.training.verification import Verification


@hydra.main(version_base=None, config_path="../conf", config_name="verify")
def main(cfg: Composed) -> None:
    """Run every case, print the matrix as it grows."""
    asked = build(Verification, cfg)
    # Found now: the ranks import this file again, and need nothing of that.
    reference = find_function("pretrain.serving.check_reference:compare_reference")(asked.probe)
    print(reference, end="\n\n", flush=True)
    code = find_function("pretrain.training.matrix:print_matrix")(asked, reference=str(reference))
    record_exit_code(max(code, int(not reference.holds)))


if __name__ == "__main__":
    sys.exit(run(main))
