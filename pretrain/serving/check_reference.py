"""Is the single rank, which every layout is compared with, the model that transformers has?

The probe's model with its first weights, written as a Hugging Face folder, runs in transformers
beside ours: the same loss, the same gradient of every tensor. MTP and the auxiliary loss, which
transformers does not have, are off.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from parallel import groups
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.initialise import initialise_weights
from pretrain.model.precision import Precision
from pretrain.serving.hf_format import config_json
from pretrain.serving.hub import CONFIG_NAME
from pretrain.serving.hub_files import SINGLE_NAME, Planned, write_shard
from pretrain.serving.names import ROUTER_BIAS, to_hugging_face
from pretrain.serving.scorer import build_for_reading, score
from pretrain.serving.trained import TrainedModel
from pretrain.serving.transformers_model import (
    check_installed,
    from_pretrained,
    loss_and_gradient_norms,
)
from pretrain.training.verification import Probe

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far one rank is from transformers."""

    loss: float
    """Relative difference."""
    gradient: float
    """Largest relative difference of a tensor's gradient norm."""
    where: str
    """Hub name of that tensor."""
    num_tensors: int

    @property
    def holds(self) -> bool:
        """Whether both are within tolerance."""
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE

    def __str__(self) -> str:
        verdict = "is" if self.holds else "IS NOT"
        return (
            f"one rank {verdict} transformers' model: loss within {self.loss:.1e}, gradients of"
            f" {self.num_tensors} tensors within {self.gradient:.1e} ({self.where})"
        )


def compare_reference(probe: Probe) -> Agreement:
    """Compare in a process of its own.

    Raises:
        ValueError: if transformers is not installed.
    """
    check_installed()
    pool = RankPool(1)
    try:
        [agreement] = pool.run(compare_here, probe)
    finally:
        pool.close()
    return agreement


def compare_here(probe: Probe) -> Agreement:
    """Compare one rank, this process, with transformers."""
    spec = replace(probe.model, num_mtp_layers=0)
    trained = TrainedModel(
        model=spec,
        precision=Precision(kind="fp32"),
        load_balance=probe.load_balance,
        mtp_loss_weight=0.0,
        sequence_tokens=probe.sequence_tokens,
    )
    layout = Layout()
    [model] = build_for_reading(trained, layout=layout, device=groups.join_world())
    initialise_weights([model], std=spec.init_std, seed=probe.seed)
    biases = {n: b for n, b in model.named_buffers() if n.endswith(ROUTER_BIAS)}
    state = {n: t.detach() for n, t in (dict(model.named_parameters()) | biases).items()}
    ids = np.random.default_rng(probe.seed).integers(
        0, spec.vocab_size, (probe.global_sequences, probe.sequence_tokens)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub = to_hugging_face(state, spec)
        shard = [Planned(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in hub.items()]
        write_shard(folder / SINGLE_NAME, shard, hub.values())
        config = config_json(
            spec,
            router_bias=bool(biases),
            dtype="float32",
            stop_ids=[],
            bos_id=None,
            pad_id=None,
        )
        (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        theirs = from_pretrained(folder, spec)
    loss, norms = loss_and_gradient_norms(theirs, torch.from_numpy(ids))
    scores = score([model], trained=trained, layout=layout, ids=ids, labels=ids, gradients=True)
    assert scores is not None
    if norms.keys() != scores.gradient_norms.keys():
        raise AssertionError(f"tensors differ: {norms.keys() ^ scores.gradient_norms.keys()}")
    gaps = {n: abs(scores.gradient_norms[n] / norm - 1) for n, norm in norms.items()}
    worst = max(gaps, key=gaps.__getitem__)
    return Agreement(
        loss=abs(scores.loss / loss - 1),
        gradient=gaps[worst],
        where=worst,
        num_tensors=len(norms),
    )
