"""Which few cases show that options work together, on layouts where several axes meet?

All combinations would be a thousand. In a pairwise cover every two values of any two options meet
in at least one case: a mistake that needs two of them is seen, one that needs three may be missed.
The layout is one of the options. No torch.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pretrain.model.exchange import Exchange
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.training.verification import Probe

Combination = Mapping[str, str]

AXES = ("tp", "cp", "pp", "ep", "etp")
LAYOUTS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: ((1, 1, 2, 1, 1), (2, 1, 1, 2, 1), (1, 2, 1, 1, 2), (1, 1, 1, 2, 1)),
    4: ((2, 1, 2, 2, 1), (2, 2, 1, 2, 2), (1, 1, 2, 1, 2), (1, 2, 2, 2, 1), (2, 1, 1, 4, 1)),
    8: ((2, 2, 2, 2, 2), (2, 1, 2, 4, 1), (1, 2, 2, 2, 1), (2, 2, 1, 4, 2), (1, 1, 4, 1, 2)),
}
"""(tp, cp, pp, ep, etp) by number of ranks: every axis at 2 or more, each with data ranks once."""

OPTIONS: Mapping[str, Sequence[str]] = {
    "schedule": ("1f1b", "interleaved"),
    "dispatcher": ("alltoall", "allgather"),
    "recompute": ("none", "selective", "full"),
    "gradients": ("at_end", "overlapped"),
    "balance": ("bias", "sequence_aux", "global_aux"),
    "precision": ("fp32", "bf16"),
    "micro": ("micro1", "micro2"),
}
"""What is combined beside the layout; the first of each is what a plain run has."""

SELECTIVE = Recompute(kind="selective", modules=("mla_up_proj", "layernorm", "mlp", "moe"))
"""Every part of a layer that can be computed again without Transformer Engine; its core attention
keeps no scores to throw away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A layout with options."""

    sizes: Mapping[str, int]
    """Of the axes; num_ranks with them."""
    probe: Probe
    """What runs there."""
    options: str = ""
    """Names of the options; empty: those of the configured probe."""

    @property
    def layout(self) -> str:
        """The sizes, as `tp2 cp1 pp1 ep2 etp1`."""
        return " ".join(f"{axis}{self.sizes[axis]}" for axis in AXES)

    @property
    def name(self) -> str:
        """Layout and options."""
        return f"{self.layout} {self.options}".rstrip()

    @property
    def reference(self) -> Probe:
        """What one rank runs for comparison: the same model and precision, all else plain."""
        return replace(
            self.probe,
            exchange=Exchange(),
            recompute=Recompute(),
            optimizer=replace(self.probe.optimizer, overlap=False),
            micro_sequences=1,
        )


def pairwise_cover(
    options: Mapping[str, Sequence[str]], *, is_legal: Callable[[Combination], bool]
) -> list[dict[str, str]]:
    """Return combinations in which every two values meet that meet in any legal combination.

    Greedy: the combination with most new pairs is next, the first of several. The same every time.

    Args:
        options: their values by name.
        is_legal: whether a combination can run.
    """
    everything = itertools.product(*options.values())
    legal = [dict(zip(options, values, strict=True)) for values in everything]
    pairs = [set(itertools.combinations(c.items(), 2)) if is_legal(c) else set() for c in legal]
    missing = set().union(*pairs)
    chosen: list[dict[str, str]] = []
    while missing:
        best = max(range(len(legal)), key=lambda idx: len(pairs[idx] & missing))
        chosen.append(legal[best])
        missing -= pairs[best]
    return chosen


def option_cases(probe: Probe, *, num_ranks: int) -> list[Case]:
    """Return the cover of options and layouts for `num_ranks` local ranks.

    Args:
        probe: the model and its steps; its own options are replaced.
        num_ranks: 2, 4 or 8.
    """
    layouts = {" ".join(map(str, sizes)): sizes for sizes in LAYOUTS[num_ranks]}

    def is_legal(combination: Combination) -> bool:
        pp = layouts[combination["layout"]][AXES.index("pp")]
        return pp > 1 or combination["schedule"] == "1f1b"

    cover = pairwise_cover({"layout": list(layouts), **OPTIONS}, is_legal=is_legal)
    return [
        _case(probe, dict(zip(AXES, layouts[c["layout"]], strict=True)), c, num_ranks)
        for c in cover
    ]


def _case(probe: Probe, sizes: Mapping[str, int], combination: Combination, num_ranks: int) -> Case:
    kind, precision = combination["balance"], combination["precision"]
    recompute = {"none": Recompute(), "selective": SELECTIVE, "full": Recompute(kind="full")}
    balance = {
        "bias": LoadBalance(kind="bias", aux_loss_coefficient=1e-2, bias_update_rate=1e-3),
        "sequence_aux": LoadBalance(kind="sequence_aux", aux_loss_coefficient=1e-2),
        "global_aux": LoadBalance(kind="global_aux", aux_loss_coefficient=1e-2),
    }
    overlap = combination["gradients"] == "overlapped"
    return Case(
        sizes={**sizes, "num_ranks": num_ranks, "vp": 1 + (combination["schedule"] != "1f1b")},
        options=" ".join(combination[option] for option in OPTIONS),
        probe=replace(
            probe,
            exchange=Exchange(
                dispatcher="allgather" if combination["dispatcher"] == "allgather" else "alltoall"
            ),
            recompute=recompute[combination["recompute"]],
            load_balance=balance[kind],
            precision=Precision(kind="bf16" if precision == "bf16" else "fp32"),
            # Small buckets: with one there would be nothing to overlap.
            optimizer=replace(probe.optimizer, overlap=overlap, bucket_parameters=20_000),
            micro_sequences=2 if combination["micro"] == "micro2" else 1,
        ),
    )
