"""How long does a training step take, beside transformers and beside its bare matrix products?

    python tests/bench/bench_step.py [--json FILE] [--repeats N] [--threads N]

Three rows, a process each, taken in turn (a b c a b c ...) so that a disturbance of the machine
meets all three:

(a) ours: one `train_step` on one rank: forward, backward, reduction, norm, clip, AdamW;
(b) transformers: AXK1ForCausalLM with sdpa attention and grouped_mm experts, the same loss and
    clip, fused AdamW;
(c) products: the matrix products of the linear layers alone, once forward and twice backward, with
    an even load of the experts; attention scores are left out. Nothing can be faster.

(a) and (b) have the same weights, tokens and threads. The bench fails if their dtype, threads,
tokens or parameters differ, or if the loss of the first step does. MTP is off: transformers has
none. Then a profile says where (a) spends its time.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import contextlib
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from parallel.groups import join_world, leave_world
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.run import AdamW
from pretrain.training.train_step import micro_batches, train_step
from tests.bench.profile_table import breakdown, format_breakdown
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving import twin

NUM_SEQUENCES, SEQUENCE_TOKENS = 8, 256
LOSS_RTOL = 1e-5
TARGET_RATIO = 0.8
WEIGHTS = "weights.safetensors"
BUDGET_S, MIN_REPEATS = 110, 3  # on a busy machine fewer repeats, not a longer bench
ADAMW = AdamW(lr=1e-4)
SPEC = ModelSpec(
    num_layers=6,
    num_dense_layers=1,
    hidden_size=256,
    dense_ffn_size=640,
    num_routed_experts=16,
    num_experts_per_token=4,
    num_shared_experts=1,
    expert_ffn_size=256,
    num_expert_groups=4,
    num_groups_per_token=2,
    routed_scaling=2.5,
    num_heads=8,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_size=32,
    qk_rope_head_size=16,
    v_head_size=32,
    vocab_size=4096,
    max_context_tokens=SEQUENCE_TOKENS,
    num_mtp_layers=0,
    init_std=0.02,
)


Step = Callable[[], float]
"""One step; returns its loss in nats per token, 0 for bare products."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a row claims to compute with."""

    name: str
    dtype: str
    num_parameters: int
    step_tokens: int
    first_loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender's measured times."""

    name: str
    dtype: str
    threads: int
    step_tokens: int
    num_parameters: int
    min_ms: float
    median_ms: float
    ratio: float
    """min_ms by transformers' min_ms."""
    paired_ratio: float
    """Median of the rounds' own ratios to transformers: what a machine that changes its speed in
    between, because others use it, has least to say in."""


def some_windows() -> Tensor:
    """Return the tokens of every step, in each process the same."""
    shape = (NUM_SEQUENCES, SEQUENCE_TOKENS + 1)
    return torch.randint(0, SPEC.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def ours(folder: Path) -> tuple[Step, Facts]:
    """Return our training step; its first weights are left in `folder`."""
    torch.manual_seed(0)
    windows = some_windows()
    model = twin.build_ours(SPEC)
    first = {name: t.detach().contiguous() for name, t in twin.tensors(model).items()}
    save_file(first, folder / WEIGHTS)
    chunks = wrap_chunks([model], config=model.config, adamw=ADAMW)
    optimizer = make_optimizer(chunks, adamw=ADAMW, precision=Precision(kind="fp32"))
    domains = torch.zeros(len(windows), dtype=torch.int64)
    batches = list(micro_batches(windows, domains, micro_sequences=len(windows)))

    def step() -> float:
        clip = ADAMW.clip_norm
        return train_step(chunks, optimizer, batches, lr=ADAMW.lr, clip_norm=clip).loss

    tokens = sum(batch.tokens.numel() for batch in batches)
    return step, facts_of("ours", model, tokens)


def theirs(folder: Path) -> tuple[Step, Facts]:
    """Return transformers' training step from the weights that ours left in `folder`."""
    windows = some_windows()
    hub = folder / "hub"
    hub.mkdir()
    model = twin.build_transformers(
        load_file(folder / WEIGHTS), SPEC, hub, experts_implementation="grouped_mm"
    ).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    used = (model.config._attn_implementation, model.config._experts_implementation)
    if used != ("sdpa", "grouped_mm"):
        sys.exit(
            f"transformers runs {used}, not its fastest: sdpa attention and grouped_mm experts"
        )
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=ADAMW.lr,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
        fused=True,
    )
    inputs, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_norm)
        optimizer.step()
        return loss.item()

    return step, facts_of("transformers", model, inputs.numel())


def facts_of(name: str, model: torch.nn.Module, step_tokens: int) -> Facts:
    """Return the row of a model, its dtypes and sizes read from its parameters."""
    parameters = list(model.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    num_parameters = sum(p.numel() for p in parameters)
    dtype = "+".join(dtypes)
    return Facts(name=name, dtype=dtype, num_parameters=num_parameters, step_tokens=step_tokens)


def products(_: Path) -> tuple[Step, Facts]:
    """Return the bare matrix products of a step: x W^T, and dy W and dy^T x backward."""
    tokens = NUM_SEQUENCES * SEQUENCE_TOKENS
    jobs: list[tuple[Tensor, Tensor, Tensor]] = []
    num_parameters = 0
    for rows, size_out, size_in, times in linear_shapes(tokens):
        num_parameters += size_out * size_in * times
        jobs += [
            (
                torch.randn(rows, size_in),
                torch.randn(size_out, size_in),
                torch.randn(rows, size_out),
            )
            for _ in range(times)
        ]

    def step() -> float:
        for x, weight, dy in jobs:
            torch.mm(x, weight.t())
            torch.mm(dy, weight)
            torch.mm(dy.t(), x)
        return 0.0

    return step, Facts(
        name="products", dtype="float32", num_parameters=num_parameters, step_tokens=tokens
    )


def linear_shapes(tokens: int) -> list[tuple[int, int, int, int]]:
    """Return (rows, out, in, times) of every linear layer; experts see the average of tokens."""
    s, d = SPEC, SPEC.hidden_size
    attention = [
        (s.q_lora_rank, d),
        (s.num_heads * s.qk_head_size, s.q_lora_rank),
        (s.kv_lora_rank + s.qk_rope_head_size, d),
        (s.num_heads * (s.qk_nope_head_size + s.v_head_size), s.kv_lora_rank),
        (d, s.num_heads * s.v_head_size),
    ]
    shapes = [(tokens, *shape, s.num_layers) for shape in attention]
    ffn_rows = [
        (tokens, s.dense_ffn_size, s.num_dense_layers),
        (tokens, s.shared_ffn_size, s.num_moe_layers),
        (
            tokens * s.num_experts_per_token // s.num_routed_experts,
            s.expert_ffn_size,
            s.num_moe_layers * s.num_routed_experts,
        ),
    ]
    for rows, width, times in ffn_rows:
        shapes += [(rows, 2 * width, d, times), (rows, d, width, times)]
    shapes.append((tokens, s.num_routed_experts, d, s.num_moe_layers))
    shapes.append((tokens, s.vocab_size, d, 1))
    return shapes


ROWS = {"ours": ours, "transformers": theirs, "products": products}


def differences(ours: Facts, theirs: Facts) -> list[str]:
    """Return what makes the comparison unfair, one line each; empty if nothing does."""
    found = [
        f"{name} differ: ours {getattr(ours, name)}, transformers {getattr(theirs, name)}"
        for name in ("dtype", "num_parameters", "step_tokens")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    losses = (ours.first_loss, theirs.first_loss)
    gap = abs(losses[0] / losses[1] - 1)
    if not gap <= LOSS_RTOL:
        found.append(f"first losses differ by {gap:.1e} relative: ours {losses[0]}, {losses[1]}")
    return found


class Contender:
    """One row's process, which builds what it times and then takes a step whenever it is asked to.

    A process each, as who trains has one: no allocator is shared.
    """

    def __init__(self, name: str, *, threads: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=serve, args=(there, name, threads, folder), daemon=True
        )
        self._process.start()
        there.close()
        self.facts: Facts = self._connection.recv()

    def __call__(self, request: str) -> Any:
        """Return the milliseconds of a `step`, or the shares of a `profile`."""
        self._connection.send(request)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def serve(connection: Connection, name: str, threads: int, folder: Path) -> None:
    """Build the row `name`, tell its facts, and take a step or a profile at each request."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    store = FileStore(f"{folder}/store_{name}", 1)
    join_world(store=store, rank=0, num_ranks=1)
    step, facts = ROWS[name](folder)
    connection.send(replace(facts, first_loss=step()))
    with contextlib.suppress(EOFError):
        while request := connection.recv():
            start = time.perf_counter()
            answer = breakdown(step, num_steps=2) if request == "profile" else step()
            took_ms = (time.perf_counter() - start) * 1e3
            if torch.get_num_threads() != threads:
                sys.exit(f"{torch.get_num_threads()} threads at {name}, {threads} at the start")
            connection.send(answer if request == "profile" else took_ms)
    leave_world()


def timed(contenders: Sequence[Contender], *, repeats: int, threads: int) -> list[Row]:
    """Time the contenders in turn, until BUDGET_S are over at the latest; all have run before."""
    times_ms: dict[str, list[float]] = {c.facts.name: [] for c in contenders}
    deadline = time.perf_counter() + BUDGET_S
    for round_idx in range(repeats):
        if round_idx >= MIN_REPEATS and time.perf_counter() > deadline:
            break
        for c in contenders:
            times_ms[c.facts.name].append(c("step"))
    reference = times_ms["transformers"]
    return [
        Row(
            name=facts.name,
            dtype=facts.dtype,
            threads=threads,
            step_tokens=facts.step_tokens,
            num_parameters=facts.num_parameters,
            min_ms=min(times_ms[facts.name]),
            median_ms=statistics.median(times_ms[facts.name]),
            ratio=min(times_ms[facts.name]) / min(reference),
            paired_ratio=statistics.median(
                own / its for own, its in zip(times_ms[facts.name], reference, strict=True)
            ),
        )
        for facts in (c.facts for c in contenders)
    ]


def format_rows(rows: Sequence[Row]) -> str:
    """Return the table for people."""
    head = (
        "row            dtype     threads  tokens/step  parameters   min ms  median ms"
        "  ratio  paired"
    )
    lines = [
        f"{r.name:<14} {r.dtype:<9} {r.threads:>7} {r.step_tokens:>12,} {r.num_parameters:>11,}"
        f" {r.min_ms:>8.0f} {r.median_ms:>10.0f} {r.ratio:>6.3f} {r.paired_ratio:>7.3f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    """Run the bench; 0 if the comparison is fair, 1 if not."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--repeats", type=int, default=40, help="timed steps of each row, at most"
    )
    arguments.add_argument("--threads", type=int, default=2, help="torch threads of all rows")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contenders = [
            Contender(name, threads=options.threads, folder=Path(folder)) for name in ROWS
        ]
        a, b, _ = contenders
        losses = (a.facts.first_loss, b.facts.first_loss)
        if unfair := differences(a.facts, b.facts):
            print("\n".join(unfair), file=sys.stderr)
            return 1
        rows = timed(contenders, repeats=options.repeats, threads=options.threads)
        shares = a("profile")
        for one in contenders:
            one.close()
    print(format_rows(rows), f"target: ours <= {TARGET_RATIO} of transformers", sep="\n")
    print(f"first losses: ours {losses[0]:.7f}, transformers {losses[1]:.7f}\n")
    print(format_breakdown(shares))
    write_result(
        options.json, losses=losses, rows=[asdict(row) for row in rows], breakdown_ms=shares
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
