"""Is a model on a CPU faster with an operator of ours than with megatron-core's?

    python tests/bench/bench_model_kernels.py [--json FILE] [--repeats N] [--threads N] [--model M]

For fp32 and bf16, and each choice of `kernels.*`: forward and backward of the whole model at the
demo's sizes (one micro-batch of 1,024 tokens), and of the part alone that the choice is about: the
router, the dense FFN, the way of tokens to the experts and back. Both ways are taken in turn, a b a
b ..., and the ratio is the median of the ratios of neighbours, so that a busy machine meets both;
the quarters beside it say how far to believe it. Below 1: ours is faster.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.compose import from_yaml
from parallel.groups import join_world, leave_world, start_groups
from parallel.layout import Layout
from parallel.seeds import seed_ranks
from pretrain.model.assemble import build_chunks
from pretrain.model.initialise import initialise_weights
from pretrain.model.kernels import Kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.model.transformer_config import transformer_config
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving.twin import MEGATRONS

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 256
NAMES = ("dual_norm", "router", "swiglu", "permute")
FUSED = {name: replace(MEGATRONS, **{name: "fused"}) for name in NAMES}
FUSED["combine"] = Kernels(dual_norm="fused", permute="fused", combine="fused")
WARM_ROUNDS = 3
Step = Callable[[], None]


def build(spec: ModelSpec, kernels: Kernels, precision: Precision) -> Any:
    """Return the model on this rank; its weights are the same for all kernels."""
    device, layout = join_world(), Layout()
    start_groups(layout)
    seed_ranks(0)
    config = transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=precision,
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )
    (model,) = build_chunks(
        spec,
        config=config,
        device=device,
        layout=layout,
        max_tokens=SEQUENCE_TOKENS,
        kernels=kernels,
        precision=precision,
    )
    if precision.is_low:
        model.bfloat16()
    initialise_weights([model], std=spec.init_std, seed=0)
    return model


def whole(model: Any) -> Step:
    """Return forward and backward of the model."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES, SEQUENCE_TOKENS)
    tokens_BS = torch.randint(0, model.vocab_size, shape, generator=generator)
    positions = torch.arange(SEQUENCE_TOKENS).expand_as(tokens_BS)

    def step() -> None:
        model.zero_grad()
        model(tokens_BS, positions, None, labels=tokens_BS.roll(-1, 1)).mean().backward()

    return step


def part(model: Any, name: str) -> Step | None:
    """Return forward and backward of the part that a kernel is about; None: it has none alone."""
    generator = torch.Generator().manual_seed(0)
    size, dtype = model.config.hidden_size, model.config.params_dtype
    x_SBD = torch.randn(SEQUENCE_TOKENS, NUM_SEQUENCES, size, generator=generator)
    x_SBD = x_SBD.to(dtype).requires_grad_()
    moe, dense = model.decoder.layers[-1].mlp, model.decoder.layers[0].mlp
    with torch.no_grad():
        weights_TE, chosen_TE = moe.router(x_SBD)

    def router() -> None:
        moe.router(x_SBD)[0].square().sum().backward()

    def swiglu() -> None:
        dense(x_SBD)[0].sum().backward()

    def permute() -> None:
        rows_RD, _ = moe.token_dispatcher.dispatch_preprocess(x_SBD, chosen_TE, weights_TE)
        moe.token_dispatcher.combine_postprocess(rows_RD).sum().backward()

    return {"router": router, "swiglu": swiglu, "permute": permute}.get(name)


def compared(megatrons: Step, ours: Step, *, repeats: int) -> dict[str, Any]:
    """Return milliseconds of both, taken in turn, and how ours compare."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_idx in range(repeats + WARM_ROUNDS):
        for step, of_step in zip((megatrons, ours), times, strict=True):
            started = time.perf_counter()
            step()
            if round_idx >= WARM_ROUNDS:
                of_step.append((time.perf_counter() - started) * 1e3)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "megatron_ms": min(times[0]),
        "ours_ms": min(times[1]),
        "ratio": ratio,
        "ratio_quarters": (low, high),
    }


def main() -> int:
    """Measure and print; always 0, nothing is decided here."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=40, help="timed passes of each way")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--model", default="axk1_tiny", help="a file of conf/model")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    text = (ROOT / "conf" / "model" / f"{options.model}.yaml").read_text("utf-8")
    spec = from_yaml(ModelSpec, text)
    rows: list[dict[str, Any]] = []
    print("precision  kernel     what   megatron ms   ours ms  ratio  quarters")
    with tempfile.TemporaryDirectory() as folder:
        join_world(store=FileStore(f"{folder}/store", 1), rank=0, num_ranks=1)
        for kind in ("fp32", "bf16"):
            precision = Precision(kind=kind)
            plain = build(spec, MEGATRONS, precision)
            for name, kernels in FUSED.items():
                fused = build(spec, kernels, precision)
                sides = {"model": (whole(plain), whole(fused))}
                alone = (part(plain, name), part(fused, name))
                if alone[0] is not None and alone[1] is not None:
                    sides["part"] = (alone[0], alone[1])
                for what, (a, b) in sides.items():
                    row = compared(a, b, repeats=options.repeats)
                    rows.append({"precision": kind, "kernel": name, "what": what, **row})
                    low, high = row["ratio_quarters"]
                    print(
                        f"{kind:<10} {name:<10} {what:<6} {row['megatron_ms']:>11.2f}"
                        f" {row['ours_ms']:>9.2f} {row['ratio']:>6.3f}  {low:.3f} to {high:.3f}",
                        flush=True,
                    )
        leave_world()
    write_result(
        options.json,
        model=options.model,
        num_tokens=NUM_SEQUENCES * SEQUENCE_TOKENS,
        threads=options.threads,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
