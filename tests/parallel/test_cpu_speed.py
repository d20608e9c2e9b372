"""Do the patches that only save time leave megatron-core's numbers as they are?"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import cpu_speed
from parallel.device import prepare

pytestmark = pytest.mark.usefixtures("one_rank")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(name: str) -> Any:
    prepare()
    return importlib.import_module(f"megatron.core.{name}")


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, draw(*out.shape, seed=1))
    return [out.detach(), gradient]


def is_equal(given: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def test_rows_are_put_back_as_by_megatron() -> None:
    order = torch.tensor([0, 2, 3, 0, 1, 2, 5])  # the fourth token chose nobody

    def put_back(name: str) -> list[Tensor]:
        unpermute = module(f"transformer.moe.{name}").unpermute
        return value_and_gradient(lambda x: unpermute(x, order, torch.Size([6, 4])), draw(7, 4))

    given, expected = put_back("token_dispatcher"), put_back("moe_utils")
    assert is_equal(given, expected)
    assert given[0][4].count_nonzero() == 0
    assert module("transformer.moe.token_dispatcher").unpermute.__module__ == cpu_speed.__name__


def test_gradients_are_clipped_as_by_megatron() -> None:
    tensors = [draw(5, 3), draw(7)]
    expected = [tensor.clone() for tensor in tensors]
    module("optimizer.clip_grads").multi_tensor_scale_impl(0, None, [tensors, tensors], 0.3)
    module("utils").local_multi_tensor_scale(0, None, [expected, expected], 0.3)
    assert is_equal(tensors, expected)


@pytest.mark.parametrize("mscale", [1.0, 1.2])
def test_queries_are_rotated_as_by_megatron(mscale: float) -> None:
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=True
    )
    angles = torch.arange(9.0)[:, None] / 100.0 ** (torch.arange(4) / 4)
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]

    def rotated(name: str) -> list[Tensor]:
        apply = module(name).apply_rotary_pos_emb
        group = object()  # read for packed sequences alone

        def part(whole: Tensor) -> Tensor:
            return apply(whole[..., 6:], freqs, config=config, mscale=mscale, cp_group=group)

        return value_and_gradient(part, draw(9, 2, 3, 14))

    both = (
        rotated("transformer.multi_latent_attention"),
        rotated("models.common.embeddings.rope_utils"),
    )
    for given, expected in zip(*both, strict=True):
        # a product and the sum it goes into may be rounded as one
        torch.testing.assert_close(given, expected, rtol=0, atol=5e-7)
    assert (
        module("transformer.multi_latent_attention").apply_rotary_pos_emb.__module__
        == cpu_speed.__name__
    )
