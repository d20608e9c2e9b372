"""Means that keep experts even: which values belong together."""

import pytest

from pretrain.model.load_balance import LoadBalance


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"aux_loss_coefficient": -1e-4}, "aux_loss_coefficient=-0.0001"),
        ({"kind": "bias", "bias_update_rate": -1e-3}, "bias_update_rate=-0.001"),
        ({"kind": "bias"}, "load_balance.kind=bias with bias_update_rate=0.0"),
        ({"bias_update_rate": 1e-3}, "load_balance.kind=sequence_aux with bias_update_rate=0.001"),
        ({"kind": "global_aux", "bias_update_rate": 1e-3}, "load_balance.kind=global_aux"),
    ],
)
def test_values_that_do_not_belong_together_are_refused(
    values: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match="given") as refusal:
        LoadBalance(**values)  # type: ignore[arg-type]  the values are wrong on purpose
    assert said in str(refusal.value)


def test_only_the_bias_kind_carries_a_bias() -> None:
    assert LoadBalance(kind="bias", bias_update_rate=1e-3).uses_bias
    assert not LoadBalance().uses_bias
    assert not LoadBalance(kind="global_aux").uses_bias
