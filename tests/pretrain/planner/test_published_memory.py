"""Predicted memory against published measurements, none fitted on the model it is scored on."""

import json
import statistics

import pytest

from pretrain.planner.memory import CONSTANTS
from pretrain.planner.published import read_rows
from pretrain.planner.published_memory import MeasuredMemory, fit, measured_memory, score
from tests.pretrain.planner.measured import ABSENT, ROWS


@pytest.fixture(scope="module")
def rows() -> list[MeasuredMemory]:
    return measured_memory(read_rows(ROWS))


@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_rows_of_other_models_predict_a_models_peak_within_a_percent(
    rows: list[MeasuredMemory],
) -> None:
    errors = [abs(one.error) for one in score(rows)]
    assert len(errors) == 11
    # the bar is 2 % and 5 %; these are what was reached, so that a step back is seen
    assert statistics.median(errors) < 0.002
    assert max(errors) < 0.01


@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_no_row_is_scored_with_its_own_model(rows: list[MeasuredMemory]) -> None:
    model = {row.row_id: row.model for row in rows}
    for one in score(rows):
        assert one.fitted_on
        assert one.row.model not in {model[name] for name in one.fitted_on}


@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_the_stored_constant_is_that_of_its_rows(rows: list[MeasuredMemory]) -> None:
    stored = json.loads(CONSTANTS.read_text(encoding="utf-8"))["workspace_bytes"]
    assert stored["fitted_on"] == [row.row_id for row in rows]
    assert stored["value"] == round(fit(rows))


def test_rows_of_one_run_that_differ_are_refused() -> None:
    row = {
        "id": "a",
        "model": "Llama3-70B",
        "layers": "12",
        "gpu": "B200",
        "num_gpus": "8",
        "precision": "BF16",
        "tp": "2",
        "pp": "1",
        "cp": "1",
        "ep": "1",
        "mbs": "1",
        "gbs": "16",
        "seq_len": "4096",
        "mem_gib": "60.68",
        "mem_kind": "max allocated (not reserved)",
        "notes": "case some_mbc4;",
        "source": "MooreThreads/SimuMax",
        "stack": "Megatron-LM",
    }
    empty = dict.fromkeys(
        ("vp", "etp", "fsdp", "recompute", "dispatcher", "routing_balance", "stack_version"), ""
    )
    whole = {**empty, **row}
    assert measured_memory([whole, {**whole, "id": "b", "gbs": "32"}])[0].num_rows == 2
    with pytest.raises(ValueError, match="differ"):
        measured_memory([whole, {**whole, "id": "b", "mem_gib": "61"}])
