"""What a run is held to: its machine, its memory, and which part was off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from parallel.spawn import threads_per_rank
from pretrain.model.precision import Precision
from pretrain.training.expectation import check_fits, expect, known_gpu
from pretrain.training.run import Run

CONF = Path(__file__).resolve().parents[3] / "conf"


def composed(*words: str) -> Run:
    with initialize_config_dir(str(CONF), version_base=None):
        return build(Run, compose("pretrain", list(words)))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(device: str, name: str | None) -> None:
    assert known_gpu(device) == name


@pytest.mark.parametrize("cluster", ["h200_1024", "h200_1536"])
def test_a_clusters_first_windows_fit_and_longer_ones_are_told_to_need_more_context_ranks(
    cluster: str,
) -> None:
    run = composed(f"+cluster={cluster}")
    told = check_fits(run, window_tokens=4096)
    assert [line.split(" tokens")[0] for line in told] == [
        "windows of 16,384",
        "windows of 32,768",
    ]


def test_a_run_that_will_not_fit_is_refused_unless_it_is_told_otherwise() -> None:
    small = ["+cluster=h200_1536", "cluster.gpu_memory_bytes=40_000_000_000"]
    with pytest.raises(ValueError, match=r"predicted.*cluster.gpu_memory_bytes=40,000,000,000"):
        check_fits(composed(*small), window_tokens=4096)
    assert check_fits(composed(*small, "prediction.allow_misfit=true"), window_tokens=4096)


def test_a_cpu_that_was_measured_predicts_and_another_says_why_not(
    tiny_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    threads = threads_per_rank(1)
    found = expect(run, device_name="cpu", threads=threads, process_bytes=300 << 20)
    assert found.metrics(window_tokens=64, global_sequences=8)["predicted_step_time_s"] > 0
    assert found.memory_bytes(64) > 300 << 20
    assert "its probe measured" in found.lines()[0]
    low = replace(run, precision=Precision(kind="bf16"))
    assert (
        "fp32 alone"
        in expect(low, device_name="cpu", threads=threads, process_bytes=300 << 20).lines()[0]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (
        "was not measured"
        in expect(run, device_name="cpu", threads=threads, process_bytes=300 << 20).lines()[0]
    )
    assert (
        "no constants of NVIDIA A10"
        in expect(run, device_name="NVIDIA A10", threads=1, process_bytes=0).source
    )
