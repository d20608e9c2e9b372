"""What does a checkpoint make of given tokens: logits, losses, chosen experts, gradients?

The model runs on any layout through the schedule that trains it; what each rank sees of it is then
put together on rank 0. The numbers are for comparison with another implementation, so everything
that only training adds is off: MTP, auxiliary losses, the optimizer.

B batch, S sequence, V vocabulary, k experts per token, R context ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel import groups
from parallel.agreement import gather_arrays, gather_json
from parallel.context import join
from parallel.device import Device
from parallel.layout import Layout
from parallel.schedule import MicroBatch, forward_backward
from parallel.seeds import seed_ranks
from pretrain.checkpoint.boxes import boxes
from pretrain.checkpoint.sharded import load_weights
from pretrain.model.assemble import build_chunks
from pretrain.model.head import logits_of
from pretrain.model.precision import Precision
from pretrain.model.router import ScaledAuxLossRouter
from pretrain.model.transformer_config import transformer_config
from pretrain.serving.hub_files import HubTensors
from pretrain.serving.names import Row, check_tensors, hub_shapes, name_table, overlaps
from pretrain.serving.trained import TrainedModel
from pretrain.training.optimizer import wrap_chunks
from pretrain.training.run import AdamW

IGNORED_LABEL = -100
"""A label that does not count, as in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model makes of a batch."""

    logits: NDArray[np.float32]
    """`[B, S, V]`."""
    token_loss: NDArray[np.float32]
    """`[B, S]`, nats: of the label after each position; 0 where none counts."""
    loss: float
    """Mean over the labels that count."""
    experts: Mapping[int, NDArray[np.int32]]
    """By MoE layer (counted from 0 over all layers): `[B, S, k]`, chosen experts, ascending."""
    expert_weights: Mapping[int, NDArray[np.float32]]
    """The same for their weights, routed scaling included."""
    gradient_norms: Mapping[str, float]
    """Of `loss`, by hub name; empty if not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What one rank saw."""

    data_rank: int
    context_rank: int
    tensor_rank: int
    logits: list[NDArray[np.float32]]  # [1, S / R, V / tp] by micro-batch; last stage only
    token_loss: list[NDArray[np.float32]]  # [1, S / R]
    routing: dict[int, list[tuple[NDArray[np.int32], NDArray[np.float32]]]]  # [S / R tp, k] each
    squares: dict[str, float]


def build_for_reading(
    trained: TrainedModel,
    *,
    layout: Layout,
    device: Device,
    precision: Precision | None = None,
) -> list[Any]:
    """Return this rank's chunks of a checkpoint's model without MTP, weights not read yet.

    Args:
        trained: the model.
        layout: how ranks divide it; its groups become the current ones.
        device: what this rank computes on.
        precision: number formats; None: those it was trained in.

    Collective: every rank calls it.
    """
    groups.start_groups(layout)
    seed_ranks(0)  # tensor ranks keep a random state each, although nothing here is random
    spec = replace(trained.model, num_mtp_layers=0)
    config = transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=precision or trained.precision,
        load_balance=replace(trained.load_balance, aux_loss_coefficient=0.0),
        mtp_loss_weight=0.0,
    )
    chunks: list[Any] = build_chunks(
        spec, config=config, device=device, layout=layout, max_tokens=spec.max_context_tokens
    )
    return [chunk.eval() for chunk in chunks]


def load(
    folder: Path, *, chunks: Sequence[Any], trained: TrainedModel, from_hub: bool = False
) -> None:
    """Put the weights of a checkpoint in place.

    Args:
        folder: a checkpoint of ours, or a Hugging Face folder.
        chunks: this rank's model chunks.
        trained: their model.
        from_hub: whether `folder` is a Hugging Face folder.

    Raises:
        CheckpointError, ValueError: if a tensor is missing, unknown or of another shape.

    Collective: every rank calls it.
    """
    if not from_hub:
        load_weights(folder, chunks=chunks)
        return
    whole = name_table(trained.model, router_bias=trained.load_balance.uses_bias)
    rows = _rows_by_key(trained)
    with HubTensors(folder) as hub, torch.no_grad():
        shapes = hub.shapes()
        check_tensors(shapes, hub_shapes(whole, trained.model, given=shapes), side="hub")
        for box in boxes(chunks):
            values = box.values.view(box.size)
            for row, in_hub, in_box in overlaps(rows[box.key], box.start, box.size):
                first = in_hub[0]
                part = hub.read_weight(row.hub, first.start, first.stop - first.start)
                target = values[in_box]
                target.copy_(part[:, *in_hub[1:]].reshape(target.shape))


def score(
    chunks: Sequence[Any],
    *,
    trained: TrainedModel,
    layout: Layout,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    gradients: bool,
) -> Scores | None:
    """Run a batch through the model.

    Args:
        chunks: this rank's model chunks, weights in place.
        trained: their model.
        layout: the current one.
        ids: `[B, S]`; B is a multiple of the data ranks.
        labels: `[B, S]` as transformers wants them: the loss at position t is that of label t + 1;
            -100 does not count.
        gradients: whether gradient norms are wanted, too.

    Returns:
        The scores on rank 0, None on the others.

    Collective: every rank calls it.
    """
    batches = _micro_batches(ids, labels, layout, next(chunks[0].parameters()).device)
    seen = _Observed(chunks)
    model: Sequence[Any] = chunks
    if gradients:
        model = wrap_chunks(chunks, config=chunks[0].config, adamw=AdamW(lr=1.0), sharded=False)
        for wrapped in model:
            wrapped.train()
            wrapped.zero_grad_buffer()  # type: ignore[operator]  DistributedDataParallel's own
    token_loss = forward_backward(
        model,
        [iter(batches) for _ in chunks],
        num_microbatches=len(batches),
        micro_batch_size=1,
        sequence_length=ids.shape[1],
        read_loss=lambda batch, loss_BS: loss_BS.float() * batch.loss_mask,
        forward_only=not gradients,
    )
    seen.remove()
    share = _Share(
        data_rank=groups.data_rank(),
        context_rank=groups.context_group().rank(),
        tensor_rank=groups.tensor_rank(),
        logits=seen.logits,
        token_loss=[loss.cpu().numpy() for loss in token_loss],
        routing=seen.routing,
        squares=_gradient_squares(chunks, trained) if gradients else {},
    )
    shares = _gather(share)
    if shares is None:
        return None
    return _merge(shares, num_counted=int((labels[:, 1:] != IGNORED_LABEL).sum()))


def _gather(share: _Share) -> list[_Share] | None:
    """Return what every rank saw, in rank order, on rank 0; None on the others."""
    own = (share.data_rank, share.context_rank, share.tensor_rank, share.squares)
    said = gather_json(own)
    arrays = gather_arrays(
        {
            **{f"logits {i}": values for i, values in enumerate(share.logits)},
            **{f"token_loss {i}": values for i, values in enumerate(share.token_loss)},
            **{
                f"{part} {layer} {i}": values
                for layer, calls in share.routing.items()
                for i, (experts, weights) in enumerate(calls)
                for part, values in (("experts", experts), ("weights", weights))
            },
        }
    )
    if said is None or arrays is None:
        return None
    return [_as_share(said[rank], found) for rank, found in enumerate(arrays)]


def _as_share(said: Sequence[Any], arrays: Mapping[str, NDArray[Any]]) -> _Share:
    """Return the share of which `_gather` sent these parts; a mapping keeps its order."""
    data_rank, context_rank, tensor_rank, squares = said
    routing: dict[int, list[tuple[NDArray[np.int32], NDArray[np.float32]]]] = {}
    for name, experts in arrays.items():
        part, *number = name.split()
        if part == "experts":
            weights = arrays[" ".join(["weights", *number])]
            routing.setdefault(int(number[0]), []).append((experts, weights))
    return _Share(
        data_rank=data_rank,
        context_rank=context_rank,
        tensor_rank=tensor_rank,
        logits=[values for name, values in arrays.items() if name.startswith("logits ")],
        token_loss=[values for name, values in arrays.items() if name.startswith("token_loss ")],
        routing=routing,
        squares=squares,
    )


def _micro_batches(
    ids: NDArray[np.int64], labels: NDArray[np.int64], layout: Layout, device: torch.device
) -> list[MicroBatch]:
    """Return this data rank's sequences, one in each micro-batch."""
    count = len(ids) // layout.dp
    mine = slice(groups.data_rank() * count, (groups.data_rank() + 1) * count)
    targets = np.full_like(labels, IGNORED_LABEL)
    targets[:, :-1] = labels[:, 1:]
    counts = targets != IGNORED_LABEL
    targets[~counts] = 0
    return [
        MicroBatch(
            tokens=torch.tensor(row[None], device=device),
            labels=torch.tensor(target[None], device=device),
            loss_mask=torch.tensor(mask[None], device=device).float(),
            domain_idx=torch.zeros(1, dtype=torch.int64, device=device),
        )
        for row, target, mask in zip(ids[mine], targets[mine], counts[mine], strict=True)
    ]


class _Observed:
    """What this rank's head and routers give while it exists."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.logits: list[NDArray[np.float32]] = []
        self.routing: dict[int, list[tuple[NDArray[np.int32], NDArray[np.float32]]]] = {}
        self._hooks: list[Any] = []
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, ScaledAuxLossRouter):
                    layer = int(module.layer_number or 0) - 1
                    self._hooks.append(module.register_forward_hook(self._router(layer)))
                elif name == "output_layer":
                    self._hooks.append(module.register_forward_hook(self._head))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _head(self, module: object, _inputs: object, output: tuple[Tensor, Any]) -> None:
        # A copy: megatron's cross entropy works in place on what the head returns.
        logits_SBV = logits_of(module, output[0]).detach().to(torch.float32, copy=True)
        self.logits.append(logits_SBV.transpose(0, 1).cpu().numpy())

    def _router(self, layer: int) -> Any:
        def keep(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            weight_TE, chosen_TE = output[0].detach().float(), output[1].bool()
            num_tokens = len(chosen_TE)
            experts_TK = chosen_TE.nonzero()[:, 1].view(num_tokens, -1)
            weights_TK = weight_TE.gather(1, experts_TK)
            self.routing.setdefault(layer, []).append(
                (experts_TK.int().cpu().numpy(), weights_TK.cpu().numpy())
            )

        return keep


def _rows_by_key(trained: TrainedModel) -> dict[str, list[Row]]:
    spec = replace(trained.model, num_mtp_layers=0)
    rows: dict[str, list[Row]] = {}
    for row in name_table(spec, router_bias=trained.load_balance.uses_bias):
        rows.setdefault(row.stored, []).append(row)
    return rows


def _gradient_squares(chunks: Sequence[Any], trained: TrainedModel) -> dict[str, float]:
    """Return, by hub name, the sum of squares of the gradients that this rank alone answers for."""
    rows = _rows_by_key(trained)
    squares: dict[str, float] = {}
    for box in boxes(chunks, of_gradients=True):
        if not box.is_owner:
            continue
        values = box.values.view(box.size)
        for row, _, in_box in overlaps(rows[box.key], box.start, box.size):
            total = float(values[in_box].double().square().sum())
            squares[row.hub] = squares.get(row.hub, 0.0) + total
    return squares


def _merge(shares: Sequence[_Share], *, num_counted: int) -> Scores:
    """Return the whole from what the ranks saw."""
    stages = [share for share in shares if share.logits]
    logits = [
        _whole_sequence([np.concatenate([s.logits[i][0] for s in part], -1) for part in parts])
        for parts in _by_place(stages)
        for i in range(len(parts[0][0].logits))
    ]
    token_loss = [
        _whole_sequence([part[0].token_loss[i][0] for part in parts])
        for parts in _by_place(stages)
        for i in range(len(parts[0][0].token_loss))
    ]
    squares: dict[str, float] = {}
    for share in shares:
        for name, value in share.squares.items():
            squares[name] = squares.get(name, 0.0) + value
    losses = np.stack(token_loss)
    routing = {
        layer: _merge_layer([share for share in shares if layer in share.routing], layer)
        for layer in sorted({layer for share in shares for layer in share.routing})
    }
    return Scores(
        logits=np.stack(logits),
        token_loss=losses,
        loss=float(losses.sum(dtype=np.float64) / num_counted) if num_counted else float("nan"),
        experts={layer: experts for layer, (experts, _) in routing.items()},
        expert_weights={layer: weights for layer, (_, weights) in routing.items()},
        gradient_norms={name: value**0.5 for name, value in squares.items()},
    )


def _by_place(shares: Sequence[_Share]) -> list[list[list[_Share]]]:
    """Return shares by data rank, context rank and tensor rank, each in order."""
    places: dict[int, dict[int, list[_Share]]] = {}
    for share in sorted(shares, key=lambda one: (one.data_rank, one.context_rank, one.tensor_rank)):
        places.setdefault(share.data_rank, {}).setdefault(share.context_rank, []).append(share)
    return [list(parts.values()) for parts in places.values()]


def _whole_sequence(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return `[S, ...]` from what the context ranks hold of it, `[S / R, ...]` each."""
    return join(torch.from_numpy(np.stack(parts))).numpy() if len(parts) > 1 else parts[0]


def _merge_layer(
    shares: Sequence[_Share], layer: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return a layer's routing `[B, S, k]`; tensor ranks hold a part's tokens in order."""
    experts: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    for parts in _by_place(shares):
        for i in range(len(parts[0][0].routing[layer])):
            both = [[share.routing[layer][i] for share in part] for part in parts]
            experts.append(_whole_sequence([np.concatenate([e for e, _ in part]) for part in both]))
            weights.append(_whole_sequence([np.concatenate([w for _, w in part]) for part in both]))
    return np.stack(experts), np.stack(weights)
