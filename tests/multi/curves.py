"""How near must the loss curves of two layouts be?"""

import pytest

from pretrain.training.verify import Curve

# fp32 sums in another order; measured at most 1.6e-7 and 1.6e-6 (docs/decisions/0013). A gradient
# that one rank forgets shows as 1e-4 or more, stock megatron-core's MTP loss with cp 2 as 3e-5.
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 1e-5


def assert_same_curve(curve: Curve, whole: Curve, *, first: int = 0) -> None:
    """Compare every step of `curve` with those of `whole` from `first` on."""
    steps = slice(first, first + len(curve.losses))
    for values in ("losses", "mtp_losses", "aux_losses"):
        expected = getattr(whole, values)[steps]
        assert getattr(curve, values) == pytest.approx(expected, rel=LOSS_TOLERANCE), values
    expected = whole.gradient_norms[steps]
    assert curve.gradient_norms == pytest.approx(expected, rel=NORM_TOLERANCE)
    if steps.stop == len(whole.losses):
        assert curve.validation == pytest.approx(whole.validation, rel=LOSS_TOLERANCE)
    if steps == slice(0, len(whole.losses)):
        assert curve.expert_tokens == whole.expert_tokens
