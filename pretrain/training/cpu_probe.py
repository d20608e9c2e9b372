"""How long do products, attention, exchanges and small training steps take on this CPU?

All ranks work at the same time with the threads of a run, since they share memory and cores. The
planner makes constants of the times (pretrain/planner/cpu.py), which also says what is timed. At
most half a minute.
"""

import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernels import native
from kernels.attention import causal_attention
from parallel import groups
from parallel.device import Device
from parallel.layout import Layout
from parallel.machine import read_cpu
from parallel.reduce import max_over_all
from parallel.seeds import seed_ranks
from pretrain.model.assemble import build_chunks
from pretrain.model.extra_losses import forget_extra_losses
from pretrain.model.initialise import initialise_weights
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.transformer_config import transformer_config
from pretrain.planner.cpu import ATTENTION, CASES, EXCHANGED_BYTES, PRODUCTS, Case, CpuTimes
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.run import AdamW
from pretrain.training.train_step import micro_batches, train_step

_REPEATS = 9
_LEAST_REPEATS = 3
_BUDGET_S = 1.5
"""Of one measurement; on a slow machine it has fewer repeats."""
_ADAMW = AdamW(lr=1e-3)
_HEADS, _SCORE, _VALUE = 4, 32, 24


def measure(path: str) -> int:
    """Measure, and have rank 0 write the times as JSON; returns the exit code 0.

    Args:
        path: the file to write.

    Collective: every rank calls it.
    """
    device = groups.join_world()
    ranks = torch.distributed.get_world_size()
    groups.start_groups(Layout(num_ranks=ranks))
    seed_ranks(0)
    times = CpuTimes(
        cpu=read_cpu().model,
        torch=importlib.metadata.version("torch"),
        threads=torch.get_num_threads(),
        ranks=ranks,
        is_compiled=native.is_there(),
        products_s=tuple(_product(shape) for shape in PRODUCTS),
        attention_s=tuple(_attention(*shape) for shape in ATTENTION),
        exchanges_s=tuple(map(_exchange, EXCHANGED_BYTES)) if ranks > 1 else (),
        steps_s=tuple(_step(case, device, ranks) for case in CASES.values()),
    )
    if torch.distributed.get_rank() == 0:
        Path(path).write_text(json.dumps(times.as_json()) + "\n", encoding="utf-8")
    return 0


def _median_s(work: Callable[[], Any]) -> float:
    """Return the median seconds of `work`, of the slowest rank; collective."""
    work()  # allocation, first use of a library
    seconds: list[float] = []
    while len(seconds) < _REPEATS:
        torch.distributed.barrier()
        begun_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun_s)
        spent_s = float(_largest(sum(seconds)))  # all ranks stop together
        if spent_s > _BUDGET_S and len(seconds) >= _LEAST_REPEATS:
            break
    return float(_largest(statistics.median(seconds)))


def _largest(value: float) -> float:
    return float(max_over_all(torch.tensor([value], dtype=torch.float64))[0])


def _product(shape: tuple[int, int, int]) -> float:
    rows, columns, inner = shape
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    return _median_s(lambda: torch.mm(x, weight.t()))


def _attention(sequences: int, tokens: int) -> float:
    queries, keys = (torch.randn(sequences, _HEADS, tokens, _SCORE) for _ in range(2))
    values = torch.randn(sequences, _HEADS, tokens, _VALUE)
    with torch.no_grad():
        return _median_s(lambda: causal_attention(queries, keys, values, scale=_SCORE**-0.5))


def _exchange(num_bytes: int) -> float:
    values = torch.zeros(num_bytes // 4)
    return _median_s(lambda: torch.distributed.all_reduce(values))


def _step(case: Case, device: Device, ranks: int) -> float:
    with _trained(case, device, ranks) as step:
        seconds = _median_s(step)
    gc.collect()  # a model less for the next
    return seconds


@contextmanager
def _trained(case: Case, device: Device, ranks: int) -> Iterator[Callable[[], Any]]:
    """Yield a training step of a case on random tokens."""
    forget_extra_losses()
    layout, precision = Layout(num_ranks=ranks), Precision(kind="fp32")
    config = transformer_config(
        case.spec,
        layout=layout,
        device=device,
        precision=precision,
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )
    modules = list(
        build_chunks(
            case.spec,
            config=config,
            device=device,
            layout=layout,
            max_tokens=case.sequence_tokens,
        )
    )
    initialise_weights(modules, std=case.spec.init_std, seed=0)
    chunks = wrap_chunks(modules, config=modules[0].config, adamw=_ADAMW)
    optimizer = make_optimizer(chunks, adamw=_ADAMW, precision=precision)
    shape = (case.sequences, case.sequence_tokens + 1)
    domains = torch.zeros(case.sequences, dtype=torch.int64)

    def step() -> None:
        tokens = torch.randint(0, case.spec.vocab_size, shape)
        batches = list(micro_batches(tokens, domains, micro_sequences=case.sequences))
        train_step(chunks, optimizer, batches, lr=_ADAMW.lr, clip_norm=_ADAMW.clip_norm)

    yield step
    forget_extra_losses()
