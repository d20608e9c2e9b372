"""The norm as megatron builds it: scale, eps and the mark for tensor ranks."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.model.norm import LATENT_NORM_EPS, RMSNorm


def config(*, sequence_parallel: bool = False) -> SimpleNamespace:
    return SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=sequence_parallel)


def test_the_scale_starts_as_ones_in_the_models_format() -> None:
    norm = RMSNorm(config(), hidden_size=5, eps=1e-6)
    assert torch.equal(norm.weight, torch.ones(5, dtype=torch.bfloat16))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gradient_is_marked_for_summing_over_tensor_ranks(sequence_parallel: bool) -> None:
    norm = RMSNorm(config(sequence_parallel=sequence_parallel), hidden_size=5, eps=1e-6)
    assert vars(norm.weight)["sequence_parallel"] is sequence_parallel


def test_a_fixed_eps_wins_over_the_models() -> None:
    given = RMSNorm(config(), hidden_size=2, eps=1.0)
    fixed = RMSNorm(config(), hidden_size=2, eps=1.0, fixed_eps=LATENT_NORM_EPS)
    x = torch.tensor([3.0, 4.0])  # mean square 12.5
    torch.testing.assert_close(given(x), x / 13.5**0.5, check_dtype=False)
    torch.testing.assert_close(fixed(x), x / 12.5**0.5, check_dtype=False)
