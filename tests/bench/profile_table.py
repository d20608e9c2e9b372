"""Where does a training step spend its CPU time? By class of operator, from torch's profiler.

Self time: what an operator spends itself, the operators it calls left out. Operators inside a norm,
a collective, the expert node or the optimizer count there, whatever they are; matrix products count
as such everywhere but in attention, whose fused operators do not show theirs. Autograd's own work
and Python between operators are the rest. The profiler adds some microseconds to each call, so
classes of many small operators are upper bounds.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

REST = "rest (autograd, views, Python)"
ATTENTION = ("attention scores", r"scaled_dot_product|_ShortAttention")
PRODUCTS = (
    "matrix products",
    r"^aten::(mm|addmm_?|bmm|baddbmm|mv|addmv|matmul|linear)$|grouped_mm",
)
# Decided by the operator or by the first one around it that matches.
AROUND: tuple[tuple[str, str], ...] = (
    ("norms", r"RMSNorm|rms_norm"),
    ("collectives", r"c10d|gloo"),
    ("optimizer", r"Optimizer\.|_fused_adamw|vector_norm|_foreach"),
    ("cross entropy", r"CrossEntropy|log_softmax|nll_loss"),
    # Compiled, their products are in it; written out in torch, those count as products.
    ("routed experts", r"_ExpertFFN"),
    ("dispatch of tokens", r"aten::(index|scatter|gather|sort|topk|nonzero|bincount|histc)"),
)
# Decided by the operator alone.
OWN: tuple[tuple[str, str], ...] = (
    ("copies and zeros", r"^aten::(copy_|cat|fill_|zero_|clone|_to_copy|constant_pad_nd)$"),
    (
        "elementwise and sums",
        r"^aten::(mul|add|sub|div|neg|exp|log|sigmoid|silu|silu_backward|sum|max|sin|cos|where|rsub"
        r"|masked_fill|pow|rsqrt|mean|lt|gt|ge|le|eq|clamp|sqrt|abs|any|all)_?$",
    ),
)


def operator_class(names: list[str]) -> str:
    """Return the class of an operator.

    Args:
        names: its name in the profile, then those of the operators around it, outwards.
    """
    if any(re.search(ATTENTION[1], name) for name in names):
        return ATTENTION[0]
    if re.search(PRODUCTS[1], names[0]):
        return PRODUCTS[0]
    for name in names:
        for title, pattern in AROUND:
            if re.search(pattern, name):
                return title
    return next((title for title, pattern in OWN if re.search(pattern, names[0])), REST)


def breakdown(step: Callable[[], object], *, num_steps: int) -> dict[str, float]:
    """Return self CPU milliseconds of one step by class, the largest first.

    Args:
        step: one training step, warmed up.
        num_steps: steps the profile is the mean of.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(num_steps):
            step()
    times: Counter[str] = Counter()
    for event in profile.events() or ():
        title = operator_class([around.name for around in outwards(event)])
        times[title] += event.self_cpu_time_total / 1e3 / num_steps
    return dict(times.most_common())


def outwards(event: Any) -> Iterator[Any]:
    """Yield an event of the profile, then the events around it."""
    while event is not None:
        yield event
        event = event.cpu_parent


def format_breakdown(times_ms: dict[str, float]) -> str:
    """Return the table for people."""
    total = sum(times_ms.values())
    lines = [f"{'where our step spends its time':<34} {'ms':>7}  share"]
    lines += [f"{title:<34} {ms:>7.0f} {ms / total:>6.1%}" for title, ms in times_ms.items()]
    return "\n".join([*lines, f"{'all, under the profiler':<34} {total:>7.0f}"])
