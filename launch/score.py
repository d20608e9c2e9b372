"""Run given tokens through a checkpoint and write what it makes of them, to be compared.

    python launch/score.py checkpoint=runs/demo input=batch.npz output=scores.npz
    torchrun --nproc-per-node 2 launch/score.py checkpoint=DIR input=batch.npz output=scores.npz \
        layout.tp=2 gradients=true

The checkpoint is one of ours, of whatever layout, or a Hugging Face folder; it is scored in fp32.
Input: `input_ids` [B, S] and, if wanted, `labels` as transformers takes them. Output: `logits`
[B, S, V], `token_loss` [B, S] (of the label after each position), `loss`, and for every MoE layer l
`experts/l` [B, S, k] (ascending) and `expert_weights/l`; with gradients `gradient_norm/<hub name>`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.checkpoint import open_trained
from launch.compose import Composed, build, record_exit_code, run
from parallel.agent import run_ranks
from parallel.spawn import find_function
from pretrain.serving.hub import is_hub, open_hub
from pretrain.serving.request import Scoring
from pretrain.training.start import USER_ERRORS

RANK_MAIN = "pretrain.serving.score_job:run_scoring"


@hydra.main(version_base=None, config_path="../conf", config_name="score")
def main(cfg: Composed) -> None:
    """Check what is asked for, then score on the ranks of the layout."""
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if under_torchrun:
        cfg.layout.num_ranks = int(os.environ["WORLD_SIZE"])
    scoring = build(Scoring, cfg)
    if from_hub := is_hub(scoring.checkpoint):
        folder, trained = scoring.checkpoint, open_hub(scoring.checkpoint)
    else:
        folder, _, trained = open_trained(scoring.checkpoint)
    args = (scoring, trained, folder, from_hub)
    if under_torchrun:
        record_exit_code(find_function(RANK_MAIN)(*args))
    else:
        record_exit_code(run_ranks(RANK_MAIN, args, num_ranks=scoring.layout.num_ranks))


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
