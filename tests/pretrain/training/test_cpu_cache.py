"""The times of a CPU are of this code, and of no other."""

from pathlib import Path

import pytest

from pretrain.training import cpu_cache


def test_other_operators_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = tmp_path / "kernels"
    operators.mkdir()
    (operators / "norm.py").write_text("x = 1\n")
    monkeypatch.setattr(cpu_cache, "_OPERATORS", (operators,))
    before = cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)})
    assert cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)}) == before
    (operators / "norm.py").write_text("x = 2\n")
    assert cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)}) != before
