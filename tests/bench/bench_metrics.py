"""What does it cost to measure a run?

    python tests/bench/bench_metrics.py [--json FILE] [--repeats N] [--interval STEPS]

One rank trains the demo's model (conf/model/axk1_tiny.yaml) on 1,024 tokens a step, as each of the
demo's two ranks does: without what measures (pretrain/training/step_metrics.py), with it switched
off, as in most steps, and with it switched on and read, as in every `--interval`th, of which every
fourth is thorough. They take turns, so that a disturbance of the machine meets all. The price is
the time inside what measures, hook by hook, of an average step; whole steps are compared beside it,
but those of one kind differ by more from each other than by what is to be found.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.stream.order import Segment
from launch.compose import from_yaml
from parallel.device import Device
from parallel.groups import join_world, leave_world
from parallel.layout import Layout
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.monitor.metrics import THOROUGH_EVERY
from pretrain.training.clip import GradientClip
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.run import AdamW
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.train_step import StepResult, micro_batches, train_step
from tests.bench.provenance import parser, write_result
from tests.pretrain.serving import twin

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 256
ADAMW = AdamW(lr=1e-4)
BUCKETS = [SimpleNamespace(domain=name) for name in ("a", "b")]
SEGMENT = Segment(num_batches=1, global_sequences=NUM_SEQUENCES, weights=(1, 1))
MOST_SHARE, MOST_MS = 0.005, 2.0
"""Of a step, whichever is more."""
Kind = Literal["bare", "off", "logged", "thorough"]
KINDS: tuple[Kind, ...] = ("bare", "off", "logged", "thorough")


class Steps:
    """Steps of one model, with what measures and without: two models would not lie alike."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        model = twin.build_ours(spec)
        self.chunks = wrap_chunks([model], config=model.config, adamw=ADAMW)
        self.optimizer = make_optimizer(self.chunks, adamw=ADAMW, precision=Precision(kind="fp32"))
        trainer: Any = SimpleNamespace(
            run=SimpleNamespace(model=spec, layout=Layout()),
            modules=[model],
            optimizer=self.optimizer,
            device=torch.device("cpu"),
            corpus=SimpleNamespace(domains=("a", "b")),
            ledger=SimpleNamespace(last_plan=SimpleNamespace(buckets=BUCKETS)),
            step_state=SimpleNamespace(include=lambda _: None),
            clip=GradientClip(ADAMW),
        )
        self.modules = list(model.modules())
        self.bare = self._hooks()
        self.metrics = StepMetrics(trainer, device=device)
        self.hooked = self._hooks()
        self.own_s = 0.0
        """Spent inside what measures, in the step that is taken."""
        for before, hooks in zip(self.bare, self.hooked, strict=True):
            for name, found in hooks.items():
                if name == "watch":
                    hooks[name] = found and self._timed(found)
                else:
                    hooks[name] = type(found)(
                        (key, hook if key in before[name] else self._timed(hook))
                        for key, hook in found.items()
                    )

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.own_s += time.perf_counter() - begun

        return call

    def _hooks(self) -> list[dict[str, Any]]:
        """Return what of each module is run or asked for by what measures."""
        names = ("_forward_hooks", "_forward_pre_hooks", "watch")
        return [
            {name: copy(vars(module)[name]) for name in names if name in vars(module)}
            for module in self.modules
        ]

    def step(self, batches: Any, *, kind: Kind) -> tuple[float, float]:
        """Take a step and return its milliseconds, and those of them inside what measures."""
        for module, hooks in zip(
            self.modules, self.bare if kind == "bare" else self.hooked, strict=True
        ):
            vars(module).update(hooks)
        self.own_s = 0.0
        begun = time.perf_counter()
        if kind != "bare":
            self._timed(self.metrics.begin_step)(
                is_logged=kind in ("logged", "thorough"), is_thorough=kind == "thorough"
            )
        result: StepResult = train_step(
            self.chunks, self.optimizer, batches, lr=1e-4, clip_norm=1.0
        )
        if kind != "bare":
            self._timed(self.metrics.count)(result, SEGMENT, num_microbatches=1)
        if kind in ("logged", "thorough"):
            self._timed(self.metrics.read)(result)
        return (time.perf_counter() - begun) * 1e3, self.own_s * 1e3


def measure(device: Device, *, repeats: int, interval: int) -> dict[str, Any]:
    """Return the milliseconds of a step, and what the metrics add to it."""
    spec = from_yaml(ModelSpec, (ROOT / "conf/model/axk1_tiny.yaml").read_text("utf-8"))
    steps = Steps(spec, device)
    windows = torch.randint(0, spec.vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1))
    domains = torch.arange(NUM_SEQUENCES) % 2
    batches = list(micro_batches(windows, domains, micro_sequences=NUM_SEQUENCES))
    whole: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    inside: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for idx in range(repeats + 2):
        for turn in range(len(KINDS)):
            kind = KINDS[(turn + idx) % len(KINDS)]
            step_ms, own_ms = steps.step(batches, kind=kind)
            if idx >= 2:  # the first make the moments
                whole[kind].append(step_ms)
                inside[kind].append(own_ms)
    step_ms = statistics.median(whole["bare"])
    off_ms, logged_ms, thorough_ms = (statistics.median(inside[kind]) for kind in KINDS[1:])
    on_ms = logged_ms + (thorough_ms - logged_ms) / THOROUGH_EVERY
    price_ms = off_ms + (on_ms - off_ms) / interval
    return {
        "step_ms": step_ms,
        "off_ms": off_ms,
        "logged_ms": logged_ms,
        "thorough_ms": thorough_ms,
        "thorough_every": THOROUGH_EVERY,
        "interval_steps": interval,
        "price_ms": price_ms,
        "share": price_ms / step_ms,
        "repeats": repeats,
        "paired_ms": {
            kind: statistics.quantiles(map(float.__sub__, whole[kind], whole["bare"]), n=4)
            for kind in KINDS[1:]
        },
    }


def main() -> int:
    """Measure and print; 1 if it costs more than it may."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=60)
    arguments.add_argument("--interval", type=int, default=10, help="steps between two logged ones")
    asked = arguments.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        device = join_world(store=FileStore(str(Path(folder) / "s"), 1), rank=0, num_ranks=1)
        figures = measure(device, repeats=asked.repeats, interval=asked.interval)
        leave_world()
    print(
        f"a step {figures['step_ms']:.1f} ms; metrics switched off {figures['off_ms']:.2f} ms,"
        f" in a logged step {figures['logged_ms']:.2f} ms, in a thorough one"
        f" {figures['thorough_ms']:.2f} ms (medians of {asked.repeats})\n"
        f"logged every {asked.interval} steps, thoroughly every {THOROUGH_EVERY}th time:"
        f" {figures['price_ms']:.2f} ms a step,"
        f" {figures['share']:.2%} of it; at most {MOST_SHARE:.1%} or {MOST_MS} ms"
    )
    for kind, (low, middle, high) in figures["paired_ms"].items():
        print(
            f"whole steps in pairs, {kind} minus bare: {middle:+.1f} ms, half of all pairs"
            f" {low:+.1f} to {high:+.1f}"
        )
    write_result(asked.json, **figures)
    return 0 if figures["price_ms"] <= max(MOST_MS, MOST_SHARE * figures["step_ms"]) else 1


if __name__ == "__main__":
    sys.exit(main())
