import math
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest

from pretrain.monitor.metrics import Value, check_names
from pretrain.monitor.plots import plot_run, read_series, smooth


def make_records(num_steps: int, num_layers: int) -> list[dict[str, Value]]:
    random = np.random.default_rng(0)
    records: list[dict[str, Value]] = []
    for step in range(1, num_steps + 1):
        loss = 2.5 + 7.0 * math.exp(-step / 40)
        record: dict[str, Value] = {
            "step": step,
            "attempt": 1 if step < num_steps // 2 else 2,
            "loss": math.nan if step == 50 else loss + 0.1 * float(random.standard_normal()),
            "lr": 3e-4 * min(1.0, step / 20),
            "load_max_over_mean": 1.2 + 2 * math.exp(-step / 60),
            "load_min_over_mean": 0.8 - 0.7 * math.exp(-step / 60),
            "gradient_norm": 0.5 + float(random.random()),
        }
        for layer in range(1, num_layers + 1):
            record[f"layer/{layer}/load_max_over_mean"] = 1.2 + 2 * math.exp(-step / 60)
            record[f"layer/{layer}/load_min_over_mean"] = 0.8 - 0.7 * math.exp(-step / 60)
        if step % 20 == 0:
            record["validation/loss"] = loss
            record["validation/bits_per_byte"] = loss / 3
            record["validation/ko/bits_per_byte"] = loss / 2.5
        check_names(record)
        records.append(record)
    return records


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(matplotlib.image.imread(path))[:, :, :3]


@pytest.mark.parametrize("num_layers", [0, 2, 8])
def test_all_four_panels_of_the_picture_hold_something(tmp_path: Path, num_layers: int):
    path = tmp_path / "plots" / "run.png"
    plot_run(
        make_records(120, num_layers),
        path,
        title="tiny $5",
        vocabulary_size=16384,
        baselines_bits_per_byte={"gzip": 2.7, "xz": 2.2},
    )
    pixels = read_pixels(path)
    assert pixels.shape == (900, 1400, 3)
    for rows in (slice(60, 400), slice(500, 840)):
        for columns in (slice(80, 600), slice(800, 1300)):
            # lines on white leave few pixels; an empty panel has only its frame and grid in grey
            colourful = np.ptp(pixels[rows, columns], axis=2) > 0.2
            assert colourful.mean() > 1e-3
    assert [file.name for file in path.parent.iterdir()] == ["run.png"]


def test_one_bare_record_is_a_picture_too(tmp_path: Path):
    plot_run([{"step": 1, "attempt": 1}], tmp_path / "run.png", title="empty")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_a_run_that_was_never_finite_is_a_picture_too(tmp_path: Path):
    names = ("loss", "gradient_norm", "lr", "validation/loss", "load_max_over_mean")
    records = [{"step": step, **dict.fromkeys(names, math.nan)} for step in range(40)]
    plot_run(records, tmp_path / "run.png", title="nan", vocabulary_size=100)
    assert (tmp_path / "run.png").exists()


def test_a_long_run_is_thinned_but_keeps_its_spike(tmp_path: Path):
    records: list[dict[str, Value]] = [{"step": step, "loss": 2.0} for step in range(20_000)]
    records[7_001]["loss"] = 9.0
    plot_run(records, tmp_path / "run.png", title="long")
    plain = [*records[:7_001], {"step": 7_001, "loss": 2.0}, *records[7_002:]]
    plot_run(plain, tmp_path / "plain.png", title="long")
    assert not np.array_equal(
        read_pixels(tmp_path / "run.png"), read_pixels(tmp_path / "plain.png")
    )


def test_nothing_to_plot_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no records"):
        plot_run([], tmp_path / "run.png", title="none")


def test_drawing_leaves_the_settings_of_the_process_alone(tmp_path: Path):
    before = dict(mpl.rcParams)
    plot_run(make_records(40, 1), tmp_path / "run.png", title="tiny")
    assert dict(mpl.rcParams) == before


def test_a_series_holds_the_steps_at_which_it_was_logged():
    steps, values = read_series(
        [{"step": 1, "lr": 0.1}, {"step": 2}, {"step": 3, "lr": 0.3}, {"step": 4, "lr": "x"}], "lr"
    )
    assert steps.tolist() == [1.0, 3.0]
    assert values.tolist() == [0.1, 0.3]


def test_smoothing_leaves_a_line_alone_and_takes_a_spike_out():
    line = np.arange(50, dtype=np.float64)
    spiked = line.copy()
    spiked[20] = 1e6
    inside = slice(4, -4)
    assert smooth(line, window=5)[inside] == pytest.approx(line[inside])
    assert np.abs(smooth(spiked, window=5) - line)[inside].max() <= 1.0


def test_smoothing_passes_over_what_is_not_finite():
    values = np.array([1.0, math.nan, 1.0, math.inf, 1.0])
    assert smooth(values, window=3) == pytest.approx(np.ones(5))


def test_an_even_window_has_no_centre():
    with pytest.raises(ValueError, match="window=4"):
        smooth(np.zeros(9), window=4)
