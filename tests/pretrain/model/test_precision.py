"""Number formats: FP8 is refused where it would silently be something else."""

import pytest

from pretrain.model import precision
from pretrain.model.precision import Precision, check_available


def test_fp8_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=r"precision\.kind=fp8_hybrid given.*set precision=bf16"):
        check_available(Precision(kind="fp8_hybrid"))


def test_fp8_with_transformer_engine_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_transformer_engine", lambda: True)
    check_available(Precision(kind="fp8_hybrid"))


@pytest.mark.parametrize(("kind", "is_low"), [("fp32", False), ("bf16", True)])
def test_the_others_run_anywhere(kind: str, is_low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_transformer_engine", lambda: False)
    chosen = Precision(kind=kind)  # type: ignore[arg-type]  from a table
    check_available(chosen)
    assert chosen.is_low is is_low
