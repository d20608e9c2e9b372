"""Which layers stand on which pipeline stage?

The embedding, every decoder layer, every MTP module and the loss count as one slot each; slots are
divided over the pp * vp stages as evenly as whole slots allow, in order. A.X K1: 1 + 61 + 1 + 1 =
64 slots, four on each of 16 stages exactly, which is how 61 layers, a prime, fit a pipeline.
Integers only.
"""

from collections.abc import Sequence

from parallel.layout import LayoutError

EMBEDDING, LAYER, MTP, LOSS = "E", "t", "m", "L"


def stage_slots(*, num_layers: int, num_mtp_layers: int, num_stages: int) -> Sequence[str]:
    """Return the slots of each stage as letters: E embedding, t layer, m MTP module, L loss.

    Stages that get a slot more than others stand in the middle: the ends also hold embedding and
        head.

    Args:
        num_layers: decoder layers.
        num_mtp_layers: MTP modules; they stand before the loss.
        num_stages: pp * vp.

    Returns:
        `num_stages` strings; for 4 layers, 1 MTP module and 2 stages: `["Ettt", "tmL"]`.

    Raises:
        LayoutError: if MTP and the loss would not share the last stage, or a stage would be empty.
    """
    slots = EMBEDDING + LAYER * num_layers + MTP * num_mtp_layers + LOSS
    base, extra = divmod(len(slots), num_stages)
    last = max(base, num_mtp_layers + 1 if num_stages > 1 else 0)
    extra -= last - base
    if base == 0 or extra < 0:
        raise LayoutError(
            f"layout.pp * layout.vp = {num_stages} stages given for {len(slots)} slots"
            f" (embedding, {num_layers} layers,"
            f" {num_mtp_layers} MTP, loss); every stage needs one and the last needs MTP and loss"
            f" together: lower"
            " layout.pp or layout.vp"
        )
    first_long = (num_stages - extra) // 2
    sizes = [base + (first_long <= stage < first_long + extra) for stage in range(num_stages)]
    sizes[-1] = max(sizes[-1], last)
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [slots[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def megatron_pipeline_layout(slots: Sequence[str]) -> str:
    """Return `slots` as megatron-core's `pipeline_model_parallel_layout`, stages divided by `|`."""
    return "|".join(slots)
