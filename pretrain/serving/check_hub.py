"""Is a Hugging Face folder the same model as a checkpoint of ours, as transformers reads it?

Two answers that do not depend on each other. Every tensor in the folder is compared bit for bit
with the one megatron holds, rounded as the folder was written: nothing is missing, exchanged or
cut. And transformers' model runs on the folder beside ours on the checkpoint: the names mean what
they should. As a whole through `from_pretrained` where both fit in memory, else a few layers at a
time, each on the same input.

B batch, S sequence, D model,
V vocabulary.
"""

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from kernels.fp8_blocks import dequantise_blocks, quantise_blocks
from parallel import groups
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.boxes import Box, boxes
from pretrain.checkpoint.stored import StoredTensors
from pretrain.model.assemble import Stage, build_chunk
from pretrain.model.precision import Precision
from pretrain.model.transformer_config import transformer_config
from pretrain.serving.hub_files import SCALE_SUFFIX, HubTensors
from pretrain.serving.names import Row, dense_post_norms, name_table, overlaps
from pretrain.serving.scorer import build_for_reading, load, score
from pretrain.serving.trained import TrainedModel
from pretrain.serving.transformers_model import (
    ExportMismatchError,
    check_installed,
    from_pretrained,
    is_quantised,
    run_layers,
)

RELATIVE_TOLERANCE = 2e-5
"""Largest difference allowed, of the largest value: fp32 sums in another order."""
NUM_SEQUENCES, SEQUENCE_TOKENS = 2, 48
_TIMEOUT_S = 24 * 3600.0
_ROUTED_ELSEWHERE = 0.01
"""Share of tokens that may be routed differently: two experts' scores equal to the last digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How close transformers' model on the folder is to ours on the checkpoint."""

    mode: Literal["whole", "layers"]
    num_tensors: int
    """Hub tensors found equal to the bit."""
    largest_difference: float
    """Of logits, or of the residual stream after a few layers."""
    largest_value: float
    """The largest of what was compared, in magnitude."""

    def __str__(self) -> str:
        what = "logits" if self.mode == "whole" else "every layer"
        return (
            f"compared with transformers: {self.num_tensors:,} tensors equal to the bit, {what}"
            f" within {self.largest_difference:.1e} of {self.largest_value:.2f}"
        )


def compare(
    hub: Path,
    checkpoint: Path,
    *,
    trained: TrainedModel,
    mode: Literal["auto", "whole", "layers"],
) -> Comparison:
    """Compare a Hugging Face folder with a checkpoint, in a process of its own.

    Args:
        hub: the folder.
        checkpoint: the checkpoint, verified.
        trained: its model.
        mode: auto: whole where both models fit in memory in fp32.

    Raises:
        ExportMismatchError: if they differ.
        ValueError: if transformers is not installed.
    """
    check_installed()
    pool = RankPool(1)
    try:
        [answer] = pool.run(
            compare_here, hub, checkpoint, trained=trained, mode=mode, timeout_s=_TIMEOUT_S
        )
    finally:
        pool.close()
    if isinstance(answer, str):
        raise ExportMismatchError(f"{hub} is not the model of {checkpoint}: {answer}")
    comparison: Comparison = answer
    return comparison


def compare_here(
    hub: Path, checkpoint: Path, *, trained: TrainedModel, mode: str
) -> Comparison | str:
    """Return the comparison, or what differs; the work of the process that `compare` starts."""
    with HubTensors(hub) as tensors:
        values = sum(int(np.prod(shape)) for shape in tensors.shapes().values())
    fits = 2.5 * 4 * values < psutil.virtual_memory().available
    # transformers' loader wants accelerate for FP8.
    loads = not is_quantised(hub) or importlib.util.find_spec("accelerate") is not None
    whole = mode == "whole" or (mode == "auto" and fits and loads)
    run = _compare_whole if whole else _compare_layers
    try:
        return run(hub, checkpoint, trained)
    except ExportMismatchError as error:
        return str(error)


def _compare_whole(hub: Path, checkpoint: Path, trained: TrainedModel) -> Comparison:
    device = groups.join_world()
    layout = Layout()
    model = build_for_reading(
        trained, layout=layout, device=device, precision=Precision(kind="fp32")
    )
    load(checkpoint, chunks=model, trained=trained)
    with HubTensors(hub) as tensors:
        num_equal = _compare_bits(model, tensors, trained, at=lambda key: key)
        num_equal += _compare_rest(tensors, trained, num_equal)
    vocabulary = trained.model.vocab_size
    sequence = min(SEQUENCE_TOKENS, trained.model.max_context_tokens)
    ids = np.random.default_rng(0).integers(0, vocabulary, (NUM_SEQUENCES, sequence))
    scores = score(model, trained=trained, layout=layout, ids=ids, labels=ids, gradients=False)
    assert scores is not None
    del model
    gc.collect()
    theirs = from_pretrained(hub, trained.model)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.float().numpy()
    difference = np.abs(logits - scores.logits)
    largest = float(np.abs(logits).max())
    tokens_off = (difference.max(-1) > RELATIVE_TOLERANCE * max(1.0, largest)).mean()
    if not tokens_off <= _ROUTED_ELSEWHERE or not np.isfinite(largest):
        raise ExportMismatchError(
            f"logits differ by up to {difference.max():.2e} at {tokens_off:.0%} of the tokens (the"
            f" largest is {largest:.2f})"
        )
    return Comparison(
        mode="whole",
        num_tensors=num_equal,
        largest_difference=float(difference.max()),
        largest_value=largest,
    )


def _compare_bits(
    chunks: Sequence[Any],
    hub: HubTensors,
    trained: TrainedModel,
    *,
    at: Callable[[str], str],
) -> int:
    """Round our weights as the folder has them, and compare; return how many hub tensors agree.

    Args:
        chunks: our model, weights in place; they are rounded in place.
        hub: the folder.
        trained: the whole model.
        at: stored key of the whole model for the key of a box.

    Raises:
        ExportMismatchError: names the first tensor that differs.
    """
    rows: dict[str, list[Row]] = {}
    for row in name_table(trained.model, router_bias=trained.load_balance.uses_bias):
        rows.setdefault(row.stored, []).append(row)
    num_equal = 0
    with torch.no_grad():
        for box in boxes(chunks):
            values = box.values.view(box.size)
            for row, _, in_box in overlaps(rows[at(box.key)], box.start, box.size):
                ours = values[in_box].view(row.shape)
                theirs = hub.read_weight(row.hub).float()
                if torch.equal(ours, theirs):  # FP8 that was imported is not to be rounded again
                    num_equal += 1
                    continue
                ours.copy_(_rounded(ours, row.hub, hub))
                if not torch.equal(ours, theirs):
                    raise ExportMismatchError(f"tensor {row.hub} is not the checkpoint's")
                num_equal += 1
    return num_equal


def _rounded(values: Tensor, name: str, hub: HubTensors) -> Tensor:
    """Return values as they become by being written in the folder's dtype."""
    if name + SCALE_SUFFIX in hub.tensors:
        source = values
        return dequantise_blocks(*quantise_blocks(source), dtype=torch.bfloat16).float()
    return values.to(hub.tensors[name].dtype).float()


def _compare_rest(hub: HubTensors, trained: TrainedModel, num_compared: int) -> int:
    """Check the tensors our model has no place for; return how many there are.

    Raises:
        ExportMismatchError: if a post norm of a dense layer is not ones, a bias of a model without
            bias is not zeros, or there is a tensor nobody knows.
    """
    names = set(hub.shapes())
    table = name_table(trained.model, router_bias=True)
    decoder = {row.hub for row in table if row.megatron.startswith("mtp.")}
    unused = {name for name in dense_post_norms(trained.model) if name in names}
    for name in unused:
        if not bool((hub.read(name).float() == 1).all()):
            raise ExportMismatchError(f"tensor {name}, which nothing applies, is not ones")
    biases: set[str] = set()
    if not trained.load_balance.uses_bias:
        biases = {n for n in names if n.endswith("e_score_correction_bias")} - decoder
        for name in biases:
            if bool(hub.read(name).any()):
                raise ExportMismatchError(f"tensor {name} is not zeros; none was trained")
    rest = names - decoder
    if len(rest) != num_compared + len(unused) + len(biases):
        raise ExportMismatchError(
            f"{len(rest)} tensors besides MTP in the folder, {num_compared} of the model,"
            f" {len(unused)} unused norms and {len(biases)} zero biases are allowed"
        )
    return len(unused) + len(biases)


def _compare_layers(hub: Path, checkpoint: Path, trained: TrainedModel) -> Comparison:
    spec = trained.model
    first = spec.num_dense_layers + 1  # megatron builds no model without a MoE layer
    blocks = [range(first), *(range(layer, layer + 1) for layer in range(first, spec.num_layers))]
    sequence = min(SEQUENCE_TOKENS, spec.max_context_tokens)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, spec.vocab_size, (NUM_SEQUENCES, sequence), generator=generator)
    num_equal, worst, largest = 0, 0.0, 0.0
    with HubTensors(hub) as tensors, StoredTensors(checkpoint) as stored:
        x_BSD = _embed(ids_BS, tensors)
        for block in blocks:
            theirs_BSD = run_layers(hub, tensors, block, x_BSD)
            gc.collect()
            ours_BSD, num_block = _run_ours(trained, tensors, stored, block, x_BSD)
            gc.collect()
            num_equal += num_block
            difference = (ours_BSD - theirs_BSD).abs()
            value = float(theirs_BSD.abs().max())
            off = float((difference.amax(-1) > RELATIVE_TOLERANCE * max(1.0, value)).float().mean())
            if not off <= _ROUTED_ELSEWHERE or not np.isfinite(value):
                raise ExportMismatchError(
                    f"layers {block.start} to {block.stop - 1} differ by up to"
                    f" {float(difference.max()):.2e} at {off:.0%} of the tokens (the largest value"
                    f" is {value:.2f})"
                )
            worst, largest = max(worst, float(difference.max())), max(largest, value)
            x_BSD = theirs_BSD
        num_equal += _compare_ends(tensors, stored, trained)
        num_equal += _compare_rest(tensors, trained, num_equal)
    return Comparison(
        mode="layers",
        num_tensors=num_equal,
        largest_difference=worst,
        largest_value=largest,
    )


def _embed(ids_BS: Tensor, hub: HubTensors) -> Tensor:
    rows = [hub.read_weight("model.embed_tokens.weight", int(i), 1) for i in ids_BS.flatten()]
    return torch.cat(rows).float().view(*ids_BS.shape, -1)


def _run_ours(
    trained: TrainedModel, hub: HubTensors, stored: StoredTensors, block: range, x_BSD: Tensor
) -> tuple[Tensor, int]:
    """Return what our layers make of `x_BSD`, and how many of their tensors equal the folder's."""
    device = groups.join_world()
    groups.start_groups(Layout())
    num_dense = sum(layer < trained.model.num_dense_layers for layer in block)
    spec = replace(
        trained.model, num_layers=len(block), num_dense_layers=num_dense, num_mtp_layers=0
    )
    config = transformer_config(
        spec,
        layout=Layout(),
        device=device,
        precision=Precision(kind="fp32"),
        load_balance=replace(trained.load_balance, aux_loss_coefficient=0.0),
        mtp_loss_weight=0.0,
    )
    model: Any = build_chunk(
        spec,
        config=config,
        device=device,
        stage=Stage(is_first=False, is_last=False),
        max_tokens=spec.max_context_tokens,
    ).eval()

    def at(key: str) -> str:
        _, _, idx, rest = key.split(".", 3)
        return f"decoder.layers.{block[int(idx)]}.{rest}"

    with torch.no_grad():
        for box in boxes([model]):
            _read_box(box, at(box.key), stored)
        num_equal = _compare_bits([model], hub, trained, at=at)
        model.set_input_tensor([x_BSD.transpose(0, 1).contiguous()])
        output_SBD: Tensor = model.decoder(hidden_states=None, attention_mask=None)
    return output_SBD.transpose(0, 1), num_equal


def _read_box(box: Box, key: str, stored: StoredTensors) -> None:
    box.values.copy_(stored.read(key, box.start, box.size).view(box.values.shape))


def _compare_ends(hub: HubTensors, stored: StoredTensors, trained: TrainedModel) -> int:
    """Compare embedding, final norm and head to the bit, some rows at a time; return how many."""
    table = name_table(trained.model, router_bias=False)
    ends = [row for row in table if not row.megatron.startswith(("decoder.layers.", "mtp."))]
    step = 4096
    for row in ends:
        for begin in range(0, row.shape[0], step):
            count = min(step, row.shape[0] - begin)
            rest = row.shape[1:]
            ours = stored.read(row.stored, (begin, *(0 for _ in rest)), (count, *rest))
            theirs = hub.read(row.hub, begin, count)
            if not torch.equal(ours.to(theirs.dtype), theirs):
                raise ExportMismatchError(f"tensor {row.hub} is not the checkpoint's")
    return len(ends)
