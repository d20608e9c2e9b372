"""Does `torchrun launch/score.py` give transformers' numbers on every layout, as a user runs it?

The folder and the expected numbers are transformers' own (tests/pretrain/serving/oracle.py).
"""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.serving.scorer import IGNORED_LABEL
from tests.pretrain.serving import oracle, twin

ROOT = Path(__file__).resolve().parents[2]
LOGITS_ATOL = 2e-5
LOSS_RTOL = 1e-6
GRADIENT_RTOL = 2e-4


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score") / "hub"
    oracle.make_hub(folder, twin.tiny_spec(num_heads=4), router_bias=True)
    return folder


@pytest.fixture(scope="module")
def batch(hub: Path) -> dict[str, NDArray[np.int64]]:
    random = np.random.default_rng(4)
    ids = random.integers(0, 208, (4, 32))
    labels = ids.copy()
    labels[1:3, :7] = IGNORED_LABEL
    np.savez(hub.parent / "batch.npz", input_ids=ids, labels=labels)
    return {"ids": ids, "labels": labels}


@pytest.fixture(scope="module")
def truth(hub: Path, batch: dict[str, NDArray[np.int64]]) -> oracle.Truth:
    return oracle.truth(hub, **batch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "layout",
    [
        "num_ranks=1",
        pytest.param("tp=2 ep=2", marks=pytest.mark.slow),
        pytest.param("ep=2", marks=pytest.mark.slow),
        pytest.param("pp=2", marks=pytest.mark.slow),
        pytest.param("ep=2 pp=2", marks=pytest.mark.slow),
        pytest.param("cp=2", marks=pytest.mark.slow),
        pytest.param("cp=2 tp=2 ep=2", marks=pytest.mark.slow),
    ],
    ids=lambda layout: layout.replace(" ", "_"),
)
def test_scores_are_those_of_transformers(
    layout: str, hub: Path, truth: oracle.Truth, tmp_path: Path
) -> None:
    output = tmp_path / "scores.npz"
    words = [f"layout.{word}" for word in layout.split()]
    num_ranks = {"num_ranks=1": 1, "ep=2 pp=2": 4, "cp=2 tp=2 ep=2": 4}.get(layout, 2)
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    launcher = [] if num_ranks == 1 else [*torchrun, f"--master-port={free_port()}"]
    places = [f"checkpoint={hub}", f"input={hub.parent / 'batch.npz'}", f"output={output}"]

    done = subprocess.run(
        [
            *(sys.executable, *launcher),
            *("launch/score.py", *words, *places, "gradients=true"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(output, allow_pickle=False) as scores:
        assert_equal(scores, truth)


def assert_equal(scores: Any, truth: oracle.Truth) -> None:
    for layer, experts in truth.experts.items():
        np.testing.assert_array_equal(scores[f"experts/{layer}"], experts)
        weights = scores[f"expert_weights/{layer}"]
        np.testing.assert_allclose(weights, truth.expert_weights[layer], 1e-5)
    np.testing.assert_allclose(scores["logits"], truth.logits, rtol=0, atol=LOGITS_ATOL)
    assert float(scores["loss"]) == pytest.approx(truth.loss, rel=LOSS_RTOL)
    norms = {n.removeprefix("gradient_norm/"): float(scores[n]) for n in scores if "_norm/" in n}
    assert norms.keys() == truth.gradient_norms.keys()
    for name, norm in truth.gradient_norms.items():
        assert norms[name] == pytest.approx(norm, rel=GRADIENT_RTOL), name
