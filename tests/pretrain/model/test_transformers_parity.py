"""Does our model compute what transformers' AXK1ForCausalLM computes with the same weights?

The oracle is written by others, in other operators (eager attention, fused experts). It gets our
weights as a checkpoint under hub names, so these tests also judge pretrain/serving/names.py.

Tolerances: fp32 rounding is about 1e-6 of the largest logit, some 4 here; measured maxima are in
the messages. The mistakes known from other ports move logits by 0.1 and more, which
`test_a_known_mistake_is_seen` makes sure of.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.norm import LATENT_NORM_EPS
from pretrain.model.spec import ModelSpec, Rope
from pretrain.serving.names import HUB_ROUTER_BIAS, to_hugging_face
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
] + [pytest.mark.usefixtures("one_rank")]

LOGITS_ATOL = 2e-5
LOSS_RTOL = 1e-6
GRADIENT_RTOL = 1e-5  # of each parameter's largest gradient
MISTAKE = 0.1

# At 128 tokens and base 100 the six rotary pairs lie on both sides of YaRN's ramp.
YARN = {
    "base": 100.0,
    "scaling_factor": 4.0,
    "original_context_tokens": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {"rope": Rope(**YARN, mscale_all_dim=0.0)},
    "yarn_scaled_scores": {"rope": Rope(**YARN, mscale_all_dim=1.0)},
    "router_bias": {"balance": twin.BIAS},
    "no_groups": {"num_expert_groups": 1, "num_groups_per_token": 1},
    "two_dense_layers_two_shared": {"num_dense_layers": 2, "num_shared_experts": 2},
}


def both(case: dict[str, Any], folder: Path) -> tuple[Any, Any, ModelSpec]:
    """Return our model, transformers' with the same weights, and their sizes."""
    case = dict(case)
    balance = case.pop("balance", twin.NO_BALANCE)
    spec = twin.tiny_spec(**case)
    ours = twin.build_ours(spec, balance=balance)
    twin.scatter_vectors(ours)
    theirs = twin.build_transformers(
        twin.tensors(ours), spec, folder / "hub", attn_implementation="eager"
    )
    return ours, theirs, spec


def windows(spec: ModelSpec) -> Tensor:
    """Return `[B, S + 1]` ids; S is the longest allowed, beyond YaRN's original context."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, spec.vocab_size, (2, spec.max_context_tokens + 1), generator=generator)


def our_logits(model: Any, tokens_BS: Tensor) -> Tensor:
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return model(tokens_BS, positions, None)


def largest_difference(ours: Any, theirs: Any, spec: ModelSpec) -> tuple[float, float]:
    """Return the largest |difference| of logits and their scale, the largest logit."""
    tokens_BS = windows(spec)[:, :-1]
    with torch.no_grad():
        expected = theirs(tokens_BS).logits
        difference = (our_logits(ours, tokens_BS) - expected).abs().max()
    return float(difference), float(expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs, spec = both(CASES[case], tmp_path)

    difference, scale = largest_difference(ours, theirs, spec)

    assert 1 < scale < 10, f"logits up to {scale:.2f}: too small or too large to compare"
    assert difference <= LOGITS_ATOL, f"{case}: logits differ by {difference:.2e} of {scale:.2f}"


@pytest.mark.parametrize("case", ["default", "router_bias", "yarn_scaled_scores"])
def test_loss_and_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs, spec = both(CASES[case], tmp_path)
    inputs_BS, labels_BS = windows(spec)[:, :-1], windows(spec)[:, 1:].contiguous()
    positions = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS)

    our_loss = ours(inputs_BS, positions, None, labels=labels_BS).mean()
    our_loss.backward()
    their_loss = theirs(inputs_BS, labels=labels_BS, shift_labels=labels_BS).loss
    their_loss.backward()

    loss_gap = abs(our_loss.item() / their_loss.item() - 1)
    assert loss_gap <= LOSS_RTOL, f"{case}: losses differ by {loss_gap:.2e} relative"
    our_gradients = to_hugging_face(gradients(ours), spec)
    their_gradients = hub_gradients(theirs, tmp_path / "gradients")
    assert our_gradients.keys() == their_gradients.keys()
    gaps = {
        name: float((our_gradients[name] - g).abs().max() / g.abs().max())
        for name, g in their_gradients.items()
    }
    worst = max(gaps, key=gaps.__getitem__)
    assert gaps[worst] <= GRADIENT_RTOL, f"{case}: gradient of {worst} differs by {gaps[worst]:.2e}"
    norm_gap = abs(global_norm(our_gradients) / global_norm(their_gradients) - 1)
    assert norm_gap <= LOSS_RTOL, f"{case}: gradient norms differ by {norm_gap:.2e} relative"


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hub_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return transformers' gradients under hub names, by its own conversion: saved as weights."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    return {name: t for name, t in saved.items() if not name.endswith(HUB_ROUTER_BIAS)}


def global_norm(state: dict[str, Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in state.values())) ** 0.5


def swap_gate_and_up(model: Any) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("linear_fc1.weight"):
            gate, up = weight.data.chunk(2)
            weight.data = torch.cat([up, gate])


def rotate_halves(model: Any) -> None:
    """Reorder rotary rows as if pairs were (j, j + half), not (2j, 2j + 1)."""
    config = model.config
    size = config.qk_pos_emb_head_dim
    order = torch.arange(size).view(2, size // 2).t().reshape(-1)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        q = attention.linear_q_up_proj.weight.data
        q = q.view(config.num_attention_heads, -1, q.shape[-1])
        q[:, -size:] = q[:, -size:][:, order]
        k = attention.linear_kv_down_proj.weight.data
        k[-size:] = k[-size:][order]


def ignore_bias(model: Any) -> None:
    for name, bias in twin.tensors(model).items():
        if name.endswith(twin.ROUTER_BIAS):
            bias.zero_()


def ignore_routed_scaling(model: Any) -> None:
    model.config.moe_router_topk_scaling_factor = 1.0


def ignore_groups(model: Any) -> None:
    model.config.moe_router_num_groups = model.config.moe_router_group_topk = None


def drop_post_norm(model: Any) -> None:
    for layer in model.decoder.layers[1:]:
        layer.post_mlp_layernorm = torch.nn.Identity()


def norm_the_dense_layer(model: Any) -> None:
    """Norm the dense FFN's output, too, as a model with post norms everywhere would."""

    def normed(_mlp: object, _inputs: object, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return F.rms_norm(out[0], out[0].shape[-1:]), out[1]

    model.decoder.layers[0].mlp.register_forward_hook(normed)


def norm_before_sum(model: Any) -> None:
    """Norm the residual stream after the addition, not the block's output before it."""
    for layer in model.decoder.layers[1:]:
        norm, layer.post_mlp_layernorm = layer.post_mlp_layernorm, torch.nn.Identity()
        layer.register_forward_hook(
            lambda _layer, _inputs, out, norm=norm: (norm(out[0]), *out[1:])
        )


def leak_bias(model: Any) -> None:
    """Weigh the chosen experts by their biased scores."""
    for layer in model.decoder.layers[1:]:
        router = layer.mlp.router

        def biased(logits: Tensor, *_args: object, router: Any = router, **_kwargs: object) -> Any:
            _, routing_map = type(router).routing(router, logits)
            scores_TE = logits.float().sigmoid().view(routing_map.shape) + router.expert_bias
            scores_TE = scores_TE.where(routing_map, 0.0)
            return 2.5 * F.normalize(scores_TE, p=1, dim=-1), routing_map

        router.routing = biased


MISTAKES = (
    swap_gate_and_up,
    rotate_halves,
    ignore_bias,
    leak_bias,
    ignore_routed_scaling,
    ignore_groups,
    drop_post_norm,
    norm_the_dense_layer,
    norm_before_sum,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_known_mistake_is_seen(mistake: Any, tmp_path: Path) -> None:
    ours, theirs, spec = both(CASES["router_bias"], tmp_path)

    mistake(ours)

    difference, _ = largest_difference(ours, theirs, spec)
    assert difference > MISTAKE, f"{mistake.__name__}: logits moved by {difference:.2e} only"


def test_latent_norms_keep_their_own_eps() -> None:
    # A wrong eps moves these logits by some 1e-5: asked of the modules, because too small to see.
    spec = twin.tiny_spec()
    model = twin.build_ours(spec)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        assert attention.q_layernorm.eps == attention.kv_layernorm.eps == LATENT_NORM_EPS == 1e-6
        assert layer.input_layernorm.eps == layer.pre_mlp_layernorm.eps == spec.rms_norm_eps == 1e-5
    assert model.decoder.final_layernorm.eps == spec.rms_norm_eps
