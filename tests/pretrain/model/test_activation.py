"""Is a feed-forward layer with our activation megatron's, whichever kind of layer it is?"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor

from kernels import native
from pretrain.model.activation import fuse_swiglu
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
] + [pytest.mark.usefixtures("one_rank")]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layers_by_kind() -> tuple[dict[str, Any], torch.nn.Module]:
    """Return a dense layer, a shared and a routed expert, and the model that has them."""
    model = twin.build_ours(twin.tiny_spec(), kernels=twin.MEGATRONS)
    moe = model.decoder.layers[1].mlp
    kinds = {
        "dense": model.decoder.layers[0].mlp,
        "shared": moe.shared_experts,
        "routed": moe.experts.local_experts[3],
    }
    return kinds, model


def results(layer: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of inputs and weights."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = layer(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    wanted = [*inputs, *layer.parameters()]
    return [output.detach(), *torch.autograd.grad(output, wanted, draw(*output.shape))]


@pytest.mark.parametrize("num_tokens", [0, 1, 33])
@pytest.mark.parametrize("kind", ["dense", "shared", "routed"])
def test_in_fp32_outputs_are_megatrons_to_the_bit_and_so_are_gradients_nearly(
    kind: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_there", lambda: False)  # torch's operators, as megatron's
    kinds, model = layers_by_kind()
    layer = kinds[kind]
    shape = (num_tokens, 64) if kind == "routed" else (num_tokens, 2, 64)
    inputs = [draw(*shape)] + ([draw(num_tokens).abs()] if kind == "routed" else [])
    expected = results(layer, inputs)
    fuse_swiglu(model)
    found = results(layer, inputs)
    assert torch.equal(found[0], expected[0])
    for given, wanted in zip(found[1:], expected[1:], strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["dense", "shared", "routed"])
def test_in_bf16_the_activation_is_rounded_once(kind: str) -> None:
    kinds, model = layers_by_kind()
    layer = kinds[kind].bfloat16()
    seen: dict[str, Tensor] = {}
    layer.linear_fc1.register_forward_hook(lambda _m, _i, out: seen.update(hidden=out[0]))
    layer.linear_fc2.register_forward_pre_hook(lambda _m, args: seen.update(active=args[0]))
    weight_T = draw(33).abs()
    x = (draw(33, 64) if kind == "routed" else draw(33, 1, 64)).bfloat16()
    inputs = [x] + ([weight_T] if kind == "routed" else [])

    def errors() -> Tensor:
        """Return the distance of each activation from the exact one, in steps of bf16."""
        gate, up = seen["hidden"].double().flatten(0, -2).chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
        exact = exact * weight_T.double()[:, None] if kind == "routed" else exact
        step = torch.exp2(exact.abs().log2().floor() - 7)
        active = seen["active"].double().flatten(0, -2)
        return ((active - exact).abs() / step).detach()

    results(layer, inputs)
    assert float(errors().max()) > 0.51  # megatron's plain one rounds more than once
    fuse_swiglu(model)
    results(layer, inputs)
    assert float(errors().max()) <= 0.501  # half a step, and what fp32 does before


class GroupedLinear(torch.nn.Module):
    """Stands for Transformer Engine's: a product for each expert's rows."""

    def __init__(self, num_experts: int, num_out: int, num_in: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(draw(num_experts, num_out, num_in))

    def forward(self, x: Tensor, num_tokens: list[int]) -> tuple[Tensor, None]:
        parts = x.split(num_tokens)
        return torch.cat([part @ w.t() for part, w in zip(parts, self.weight, strict=True)]), None


class Padding(torch.nn.Module):
    """Stands for Transformer Engine's: each expert's rows to a multiple of 16, and back."""

    def __init__(self, *, is_back: bool) -> None:
        super().__init__()
        self.is_back = is_back

    def forward(self, x: Tensor, num_tokens: list[int]) -> Any:
        wide = [-(-n // 16) * 16 for n in num_tokens]
        if self.is_back:
            parts = zip(x.split(wide), num_tokens, strict=True)
            return torch.cat([part[:n] for part, n in parts])
        parts = zip(x.split(num_tokens), wide, strict=True)
        filled = [torch.cat([part, part.new_zeros(w - len(part), x.shape[1])]) for part, w in parts]
        return torch.cat(filled), wide


@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_grouped_experts_are_megatrons_with_stand_ins_for_transformer_engine(
    fp8: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_there", lambda: False)  # torch's operators, as megatron's
    _, model = layers_by_kind()
    config: Any = copy.copy(model.config)
    config.fp8 = fp8
    experts: Any = TEGroupedMLP.__new__(TEGroupedMLP)
    torch.nn.Module.__init__(experts)
    experts.config, experts.activation_func = config, config.activation_func
    experts.offload_expert_fc1 = experts.offload_moe_act = experts.activation_recompute = False
    experts.linear_fc1, experts.linear_fc2 = GroupedLinear(3, 80, 64), GroupedLinear(3, 64, 40)
    experts.quantization_padding = Padding(is_back=False)
    experts.quantization_unpadding = Padding(is_back=True)
    x_TD, weight_T, counts = draw(33, 64), draw(33).abs(), torch.tensor([5, 0, 28])

    def through(x: Tensor, weight: Tensor) -> Any:
        return experts(x, counts, weight)

    through.parameters = experts.parameters  # type: ignore[attr-defined]  what `results` reads
    expected = results(through, [x_TD, weight_T])
    fuse_swiglu(experts)
    found = results(through, [x_TD, weight_T])
    assert torch.equal(found[0], expected[0])
    for given, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_func_clamp_value", 7.0),
        ("glu_linear_offset", 1.0),
        ("add_bias_linear", True),
        ("activation_func", torch.nn.functional.gelu),
    ],
)
def test_another_activation_is_refused(key: str, value: object) -> None:
    _, model = layers_by_kind()
    dense: Any = model.decoder.layers[0].mlp  # type: ignore[union-attr, index]  megatron's
    assert isinstance(dense, MLP)
    dense.config = copy.copy(dense.config)
    setattr(dense.config, key, value)
    with pytest.raises(ValueError, match=rf"{key}=.*kernels.swiglu=megatron"):
        fuse_swiglu(model)
