"""Does scoring a Hugging Face folder give transformers' own numbers, tensor by tensor?

transformers makes the folder and is asked for logits, loss, chosen experts and every tensor's
gradient; we read the folder into megatron's modules and are asked the same.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parallel.layout import Layout
from pretrain.model.spec import Rope
from pretrain.serving.hub import open_hub
from pretrain.serving.scorer import IGNORED_LABEL, Scores, build_for_reading, load, score
from tests.pretrain.model.test_transformers_parity import YARN
from tests.pretrain.serving import oracle, twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
] + [pytest.mark.usefixtures("one_rank")]

LOGITS_ATOL = 2e-5
LOSS_RTOL = 1e-6
GRADIENT_RTOL = 2e-4
ODD = {"hidden_size": 60, "dense_ffn_size": 131, "expert_ffn_size": 37, "vocab_size": 211}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "router_bias": {"router_bias": True},
    "yarn": {"rope": Rope(**YARN, mscale_all_dim=0.0)},
    "yarn_scaled_scores": {"rope": Rope(**YARN, mscale_all_dim=1.0), "router_bias": True},
    "mtp": {"num_mtp_layers": 1, "router_bias": True},
    "two_dense_layers": {"num_dense_layers": 2, "num_shared_experts": 2},
    "one_group": {"num_expert_groups": 1, "num_groups_per_token": 1},
    "odd_sizes": ODD,
}


def batch(vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids `[2, 64]` and labels of which some do not count."""
    random = np.random.default_rng(3)
    ids = random.integers(0, vocab_size, (2, 64))
    labels = ids.copy()
    labels[0, :20] = labels[1, 40:44] = IGNORED_LABEL
    return ids, labels


def scored(folder: Path, ids: NDArray[np.int64], labels: NDArray[np.int64], device: Any) -> Scores:
    trained = open_hub(folder)
    layout = Layout()
    chunks = build_for_reading(trained, layout=layout, device=device, precision=twin.FP32)
    load(folder, chunks=chunks, trained=trained, from_hub=True)
    scores = score(chunks, trained=trained, layout=layout, ids=ids, labels=labels, gradients=True)
    assert scores is not None
    return scores


def assert_equal(scores: Scores, truth: oracle.Truth) -> None:
    """Fail unless logits, loss, routing and every gradient norm are transformers'."""
    scale = float(np.abs(truth.logits).max())
    assert 1 < scale < 20, f"logits up to {scale:.2f}: too small or too large to compare"
    assert scores.experts.keys() == truth.experts.keys()
    for layer, experts in truth.experts.items():
        np.testing.assert_array_equal(scores.experts[layer], experts)
        np.testing.assert_allclose(scores.expert_weights[layer], truth.expert_weights[layer], 1e-5)
    np.testing.assert_allclose(scores.logits, truth.logits, rtol=0, atol=LOGITS_ATOL)
    assert scores.loss == pytest.approx(truth.loss, rel=LOSS_RTOL)
    assert scores.gradient_norms.keys() == truth.gradient_norms.keys()
    for name, norm in truth.gradient_norms.items():
        assert scores.gradient_norms[name] == pytest.approx(norm, rel=GRADIENT_RTOL), name


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(case: str, tmp_path: Path, one_rank: Any) -> None:
    sizes = dict(CASES[case])
    router_bias = sizes.pop("router_bias", False)
    spec = twin.tiny_spec(**sizes)
    oracle.make_hub(tmp_path / "hub", spec, router_bias=router_bias)
    ids, labels = batch(spec.vocab_size)

    scores = scored(tmp_path / "hub", ids, labels, one_rank)

    assert_equal(scores, oracle.truth(tmp_path / "hub", ids, labels))


def test_token_losses_add_up_to_the_loss(tmp_path: Path, one_rank: Any) -> None:
    spec = twin.tiny_spec()
    oracle.make_hub(tmp_path / "hub", spec)
    ids, labels = batch(spec.vocab_size)

    scores = scored(tmp_path / "hub", ids, labels, one_rank)

    counts = np.zeros(ids.shape, dtype=bool)
    counts[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    shifted = scores.logits.astype(np.float64)
    chosen = np.take_along_axis(shifted, np.roll(ids, -1, 1)[..., None], -1)[..., 0]
    expected = np.log(np.exp(shifted).sum(-1)) - chosen
    np.testing.assert_allclose(scores.token_loss[counts], expected[counts], rtol=1e-5)
    assert not scores.token_loss[~counts].any()
    assert scores.loss == pytest.approx(scores.token_loss[counts].mean(dtype=np.float64))
