"""What is trained while faults strike: small, and with every part that a save could lose.

24 steps in two stages of other window lengths, a mixture that moves, MTP, router bias, several
buckets of gradients with overlap, a checkpoint every four steps of which two stay. With a local
tier: one on the node every two steps, one on shared storage every eight.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from data.stream.curriculum import Curriculum, Mixture, Stage
from parallel.layout import Layout
from pretrain.checkpoint.local_place import LocalTier
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.restarts import Restarts
from pretrain.training.run import AdamW, CheckpointPolicy, Data, Evaluation, Run
from tests.conftest import TINY_MODEL

INTERVAL, KEEP = 4, 2
LOCAL_INTERVAL, SHARED_INTERVAL = 2, 8
NUM_STEPS = 24
CURRICULUM = Curriculum(
    stages={
        "short": Stage(
            tokens=16 * 4 * 64,
            window_tokens=64,
            global_sequences=4,
            pieces=2,
            begin=Mixture(domains={"code": 1.0, "sentences": 3.0}),
            end=Mixture(domains={"code": 3.0, "sentences": 1.0}),
        ),
        "long": Stage(tokens=8 * 4 * 128, window_tokens=128, global_sequences=4),
    },
    max_epochs=100.0,
)
LAYOUTS = {
    "ep2": Layout(num_ranks=2, ep=2),
    "pp2": Layout(num_ranks=2, pp=2),
    "dp2": Layout(num_ranks=2),
    "tp2": Layout(num_ranks=2, tp=2),
    "cp2": Layout(num_ranks=2, cp=2),
    "etp2": Layout(num_ranks=2, etp=2),
    "pp2 ep2": Layout(num_ranks=4, pp=2, ep=2),
    "tp2 ep2": Layout(num_ranks=4, tp=2, ep=2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A run to disturb."""

    layout: str
    """Of LAYOUTS."""
    in_job: int = 0
    """Restarts by the command itself; 0: whoever started it starts it again, as a batch system."""
    without_progress: int = 3
    """Starts in vain before the run gives up."""
    local: Path | None = None
    """Folder of checkpoints on the node's own disk; with it shared ones are seldom."""

    def run(self, output_root: Path, *, corpus: Path, name: str) -> Run:
        """Return its configuration.

        Args:
            output_root: where its folder will be.
            corpus: a prepared corpus of windows of 64 and of 128 (tests/conftest.py).
            name: of the run.
        """
        layout = LAYOUTS[self.layout]
        policy = CheckpointPolicy(interval_steps=INTERVAL, keep=KEEP, read_back=1.0)
        if self.local is not None:
            tier = LocalTier(folder=self.local, interval_steps=LOCAL_INTERVAL)
            policy = replace(policy, interval_steps=SHARED_INTERVAL, local=tier)
        return Run(
            name=name,
            output_root=output_root,
            seed=1,
            mtp_loss_weight=0.3,
            model=ModelSpec(**TINY_MODEL),  # pyright: ignore[reportArgumentType]  sizes and rates
            layout=layout,
            precision=Precision(kind="fp32"),
            load_balance=LoadBalance(kind="bias", bias_update_rate=1e-3),
            optimizer=AdamW(lr=1e-3, overlap=layout.pp == 1, bucket_parameters=20_000),
            lr_schedule=LrSchedule(warmup_tokens=0, decay_tokens=0, final_ratio=1.0),
            curriculum=CURRICULUM,
            micro_batch_tokens=64,
            data=Data(corpus=corpus),
            evaluation=Evaluation(
                interval_steps=6, windows_per_domain=1, final_windows_per_domain=1
            ),
            checkpoints=policy,
            telemetry=TelemetryConfig(wandb="disabled", console_interval_steps=3),
            restarts=Restarts(
                in_job=self.in_job, without_progress=self.without_progress, lease_s=5.0
            ),
        )
