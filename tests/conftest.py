"""What every test may rely on: an environment that is not the caller's, and stated skips."""

import os
from collections.abc import Sequence

import pytest

# Left over from a torchrun, a batch job or a developer's shell, each of these changes what a test
# sees: a rank that waits for peers, a traceback where one line is expected, a metric sent away.
FOREIGN_PREFIXES = ("HYDRA_", "SLURM_", "TORCHELASTIC_", "NCCL_", "GLOO_", "WANDB_", "NVTE_")
FOREIGN_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OURS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove variables of launchers and of the developer's shell; forbid the network."""
    for name in list(os.environ):
        if name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES):
            monkeypatch.delenv(name)
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, and say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where GPU tests were collected: it costs seconds

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none here"))
