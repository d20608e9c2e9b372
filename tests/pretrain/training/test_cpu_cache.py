"""The times of a CPU are of this code, and of no other."""

from pathlib import Path

import pytest

from pretrain.training import cpu_cache
from tests.cpu_times import fill_cache


def test_other_operators_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = tmp_path / "kernels"
    operators.mkdir()
    (operators / "norm.py").write_text("x = 1\n")
    monkeypatch.setattr(cpu_cache, "_OPERATORS", (operators,))
    before = cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)})
    assert cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)}) == before
    (operators / "norm.py").write_text("x = 2\n")
    assert cpu_cache.cache_file(2, environment={"XDG_CACHE_HOME": str(tmp_path)}) != before


def test_only_an_unknown_cpu_without_cuda_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cpu_cache, "run_ranks", lambda *_, **__: asked.append("ranks") or 1)
    monkeypatch.setattr(cpu_cache, "has_cuda", lambda: asked.append("cuda") or has_gpu)

    def measure(folder: Path) -> list[str]:
        asked.clear()
        cpu_cache.measure_once(2, environment={"XDG_CACHE_HOME": str(folder)}, preload="math")
        return list(asked)

    has_gpu = False
    assert measure(tmp_path / "unknown") == ["cuda", "ranks"]
    has_gpu = True
    assert measure(tmp_path / "unknown") == ["cuda"]
    fill_cache(tmp_path / "known")
    assert measure(tmp_path / "known") == []  # not even asked for CUDA: torch takes seconds
