"""Does the dashboard show everything that the registry names, and nothing else?"""

import pytest

from pretrain.monitor.dashboard import NOT_DRAWN, ROWS, Panel
from pretrain.monitor.metrics import METRICS


def test_every_metric_has_its_place_in_a_row() -> None:
    shown = {name for row in ROWS for panel in row.panels for name in panel.metrics}
    assert shown | set(NOT_DRAWN) == {metric.name for metric in METRICS}
    assert not shown & set(NOT_DRAWN)


def test_there_are_six_rows_from_health_to_system() -> None:
    titles = [row.title.split()[0] for row in ROWS]
    assert titles == ["Health", "Loss", "Gradients", "MoE", "Numerics", "System"]


def test_no_two_panels_of_a_row_have_the_same_title() -> None:
    for row in ROWS:
        titles = [panel.title for panel in row.panels]
        assert len(titles) == len(set(titles))


@pytest.mark.parametrize(
    ("metrics", "kind", "said"),
    [
        (("losss",), "line", "not in the registry"),
        ((), "line", "at least one"),
        (("loss", "lr"), "line", "one unit"),
        (("loss",), "layers", "one pattern"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused(
    metrics: tuple[str, ...], kind: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Panel(title="x", metrics=metrics, kind=kind)  # type: ignore[arg-type]  one that is none


def test_a_pattern_stands_for_what_was_recorded_with_layers_counted_upwards() -> None:
    panel = Panel(title="x", metrics=("layer/<layer>/dead_experts",), kind="layers")
    recorded = ("loss", "layer/10/dead_experts", "layer/2/dead_experts", "layer/2/residual_rms")
    assert panel.names_in(recorded) == ("layer/2/dead_experts", "layer/10/dead_experts")
