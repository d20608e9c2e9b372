"""What does autograd keep on this rank, by hooks on every tensor that it saves?

The oracle of the planner's activations: torch's own saved-tensor hooks on the real model. A storage
counts once, however many views of it are kept; parameters do not count; what is freed again
(recomputation empties outputs in place) does not. Collected where the forward pass of a
micro-batch ends: what is kept at that moment, the micro-batches in flight included.
"""

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import groups
from parallel.layout import Layout
from parallel.schedule import MicroBatch, forward_backward
from parallel.seeds import seed_ranks
from pretrain.model.assemble import build_chunks
from pretrain.model.extra_losses import forget_extra_losses
from pretrain.model.initialise import initialise_weights
from pretrain.model.kernels import Kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.model.spec import ModelSpec
from pretrain.model.transformer_config import transformer_config
from pretrain.training.optimizer import wrap_chunks
from pretrain.training.run import AdamW


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is run."""

    spec: ModelSpec
    layout: Layout
    precision: Precision
    recompute: Recompute
    kernels: Kernels
    sequence_tokens: int
    micro_sequences: int
    num_microbatches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What a rank kept where the forward passes of its micro-batches ended."""

    peak_bytes: int
    """The most at any such moment, all micro-batches in flight together."""
    by_module: Mapping[str, int]
    """Bytes at the first such moment, by the innermost module that saved the storage first."""
    routed: tuple[int, ...]
    """Rows that this rank's experts got in each MoE layer, MTP last, of the first micro-batch."""
    moments: tuple[int, ...]
    """Bytes at each such moment."""


class _Held:
    """A saved tensor; alive as long as autograd keeps it."""

    __slots__ = ("recorder", "tensor")

    def __init__(self, tensor: torch.Tensor, recorder: "_Recorder") -> None:
        self.tensor, self.recorder = tensor, recorder
        recorder.add(tensor)

    def __del__(self) -> None:
        self.recorder.drop(self.tensor)


class _Recorder:
    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.num_holders: Counter[int] = Counter()
        self.storages: dict[int, Any] = {}
        self.owners: dict[int, str] = {}
        self.stack: list[str] = []
        self.moments: list[int] = []
        self.first: dict[str, int] | None = None

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.parameters:
            return
        self.num_holders[key] += 1
        if key not in self.storages:
            self.storages[key] = storage
            where = self.stack[-1] if self.stack else "outside"
            self.owners[key] = f"{where} {tuple(tensor.shape)} {_line()}"

    def drop(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self.num_holders:
            return
        self.num_holders[key] -= 1
        if not self.num_holders[key]:
            del self.num_holders[key], self.storages[key], self.owners[key]

    def look(self) -> None:
        self.moments.append(sum(s.nbytes() for s in self.storages.values()))
        if self.first is None:
            self.first = {}
            for key, storage in self.storages.items():
                owner = self.owners[key]
                self.first[owner] = self.first.get(owner, 0) + storage.nbytes()


def _line() -> str:
    """Return the innermost line of ours or megatron's."""
    for frame in reversed(traceback.extract_stack(limit=24)):
        if "saved_tensors" in frame.filename or "/torch/" in frame.filename:
            continue
        return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "?"


def measure(case: Case) -> Kept:
    """Return what this rank keeps in one step of `case`; collective, every rank calls it."""
    device = groups.join_world()
    forget_extra_losses()  # another model's, whose layers are others
    groups.start_groups(case.layout)
    seed_ranks(0)
    config = transformer_config(
        case.spec,
        layout=case.layout,
        device=device,
        precision=case.precision,
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
        recompute=case.recompute,
    )
    modules = build_chunks(
        case.spec,
        config=config,
        device=device,
        layout=case.layout,
        max_tokens=case.sequence_tokens,
        loss_chunk_tokens=case.recompute.loss_chunk_tokens,
        kernels=case.kernels,
        precision=case.precision,
    )
    initialise_weights(modules, std=case.spec.init_std, seed=0)
    adamw = AdamW(lr=1e-3, overlap=False, bucket_parameters=20_000)
    chunks: list[Any] = wrap_chunks(modules, config=config, adamw=adamw)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    recorder = _Recorder([*parameters, *(b for m in modules for b in m.buffers())])
    routed: list[int] = []
    with _stacked(chunks, recorder, routed):
        _run(case, chunks, recorder)
    num_moe = sum(type(m).__name__ == "MoELayer" for chunk in modules for m in chunk.modules())
    return Kept(
        peak_bytes=max(recorder.moments),
        by_module=recorder.first or {},
        routed=tuple(routed[:num_moe]),
        moments=tuple(recorder.moments),
    )


def _run(case: Case, chunks: Sequence[Any], recorder: _Recorder) -> None:
    generator = torch.Generator().manual_seed(groups.data_rank())
    batches = [_batch(case, generator) for _ in range(case.num_microbatches)]

    def pack(tensor: torch.Tensor) -> _Held:
        return _Held(tensor, recorder)

    def unpack(held: _Held) -> torch.Tensor:
        return held.tensor

    def read_loss(_batch: MicroBatch, loss: torch.Tensor) -> torch.Tensor:
        return loss.sum()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward_backward(
            chunks,
            [iter(batches) for _ in chunks],
            num_microbatches=case.num_microbatches,
            micro_batch_size=case.micro_sequences,
            sequence_length=case.sequence_tokens,
            read_loss=read_loss,
        )


def _batch(case: Case, generator: torch.Generator) -> MicroBatch:
    shape = (case.micro_sequences, case.sequence_tokens)
    tokens, labels = (
        torch.randint(0, case.spec.vocab_size, shape, generator=generator) for _ in range(2)
    )
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(shape),
        domain_idx=torch.zeros(case.micro_sequences, dtype=torch.int64),
    )


@contextmanager
def _stacked(chunks: Sequence[Any], recorder: _Recorder, routed: list[int]) -> Iterator[None]:
    """Let the recorder know the innermost module, and look where a chunk's forward pass ends."""
    handles: list[Any] = []
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if ".experts." in name:
                continue  # a hook on an expert makes ours be called one by one

            def enter(_m: Any, _a: Any, name: str = name) -> None:
                recorder.stack.append(name)

            def leave(_m: Any, _a: Any, _o: Any) -> None:
                recorder.stack.pop()

            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
            if name.endswith("mlp.experts"):

                def count(_m: Any, args: Any, _o: Any) -> None:
                    routed.append(len(args[0]))

                handles.append(module.register_forward_hook(count))
        handles.append(chunk.register_forward_hook(lambda *_: recorder.look()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
