"""May these ranks cut this model and its sequences?

A size that does not divide fails in megatron-core's layers, after every rank has started, without
the key to change; so each is refused here first. Integers only, no torch: the planner and `Run` ask
before anything is built.
"""

from parallel.layout import Layout, LayoutError
from parallel.stages import stage_slots
from pretrain.model.spec import ModelSpec


def check_cuts(spec: ModelSpec, *, layout: Layout, sequence_tokens: int) -> None:
    """Refuse a layout whose axes do not divide what they cut.

    Args:
        spec: the model's sizes.
        layout: how ranks divide it.
        sequence_tokens: tokens in a whole training sequence.

    Raises:
        LayoutError: names the axis, the size it would cut, and both keys.

    Source: megatron-core 0.16.1: tensor_parallel/layers.py (columns, rows, vocabulary),
        transformer/moe/experts.py (experts), multi_token_prediction.py:651 (the MTP projection).
    """
    _check_sizes(spec, layout)
    _check_sequences(spec, layout, sequence_tokens)
    if layout.pp > 1:
        stage_slots(
            num_layers=spec.num_layers,
            num_mtp_layers=spec.num_mtp_layers,
            num_stages=layout.pp * layout.vp,
        )


def _check_sizes(spec: ModelSpec, layout: Layout) -> None:
    cut = {
        "ep": ["num_routed_experts"],
        "tp": ["num_heads", "vocab_size"],
        "etp": ["expert_ffn_size"],
    }
    if spec.num_dense_layers:
        cut["tp"].append("dense_ffn_size")
    if spec.num_mtp_layers:
        cut["tp"].append("hidden_size")  # the projection from 2 D to D is cut by columns
    for axis, names in cut.items():
        for name in names:
            if getattr(spec, name) % getattr(layout, axis):
                raise LayoutError(
                    f"layout.{axis}={getattr(layout, axis)} given; it must divide"
                    f" model.{name}={getattr(spec, name)}: change one of the two"
                )
    if spec.shared_ffn_size % layout.tp:
        raise LayoutError(
            f"layout.tp={layout.tp} given; it must divide the shared experts' inner size,"
            f" model.num_shared_experts={spec.num_shared_experts} *"
            f" model.expert_ffn_size={spec.expert_ffn_size} = {spec.shared_ffn_size}: change one of"
            " the three"
        )


def _check_sequences(spec: ModelSpec, layout: Layout, sequence_tokens: int) -> None:
    # Context ranks take two pieces of each sequence, tensor ranks cut what each of them has.
    if sequence_tokens % (2 * layout.cp * layout.tp) and layout.cp * layout.tp > 1:
        raise LayoutError(
            f"layout.cp={layout.cp} and layout.tp={layout.tp} given; 2 * cp * tp ="
            f" {2 * layout.cp * layout.tp} must divide a window of {sequence_tokens} tokens:"
            " change window_tokens of the curriculum's stage, or one of the two"
        )
    rope = spec.rope
    if rope.scaling_factor > 1 and rope.original_context_tokens % (2 * layout.cp):
        raise LayoutError(
            f"layout.cp={layout.cp} given; with YaRN 2 * cp must divide"
            f" model.rope.original_context_tokens={rope.original_context_tokens}"
        )
