"""Constants come back from steps that were made with them, and nothing is scored on what it saw."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from parallel.layout import Layout
from pretrain.planner.fitting import Measured, fit, hardware, intervals, leave_one_out, scored
from pretrain.planner.hardware import FILE, Constants, gpu_of, hardware_of
from pretrain.planner.known_models import KNOWN_MODELS
from pretrain.planner.step_time import predict_step
from pretrain.planner.workload import Workload, even_stages
from tests.bench import fit_planner
from tests.pretrain.planner.measured import ABSENT, ROOT, ROWS

TRUE = replace(Constants(), product_bf16=0.68, memory=0.62, attention=0.78)
FIGURES = ROOT / "docs" / "figures" / "planner_time.json"


def made(row_id: str, name: str, *, sequence_tokens: int, micro: int = 1) -> Measured:
    model, layout = KNOWN_MODELS[name], Layout(num_ranks=8, tp=8)
    workload = Workload(
        architecture=model,
        layout=layout,
        stages=even_stages(model, layout),
        micro_batch_sequences=micro,
        global_batch_sequences=16,
        sequence_tokens=sequence_tokens,
        gpu="H100",
    )
    step = predict_step(workload, hardware(gpu_of("H100"), TRUE))
    return Measured(
        row_id=row_id,
        model=name,
        workload=workload,
        gpu=gpu_of("H100"),
        tokens_per_s=step.tokens_per_s,
    )


MADE = [
    made("a", "Llama3-8B", sequence_tokens=4096),
    made("b", "Llama3-8B", sequence_tokens=131_072),
    made("c", "Llama3-70B", sequence_tokens=8192),
    made("d", "Llama3.1-405B", sequence_tokens=8192, micro=2),
]


def test_a_fit_predicts_what_it_was_made_from() -> None:
    found = fit(MADE)
    for row in MADE:
        step = predict_step(row.workload, hardware(row.gpu, found.constants))
        # priors pull; less than a third of what is left of 11 % to 20 % without a fit
        assert step.tokens_per_s == pytest.approx(row.tokens_per_s, rel=0.03)
    assert found.constants.attention > Constants().attention
    assert found.constants.product_bf16 < Constants().product_bf16


def test_without_a_model_no_row_of_it_is_fitted() -> None:
    without, whole = leave_one_out(MADE)
    assert whole.rows == ("a", "b", "c", "d")
    assert without["Llama3-8B"].rows == ("c", "d")
    for score in scored(MADE, without):
        own = {row.row_id for row in MADE if row.model == score.row.model}
        assert not own & set(score.fitted_on)


def test_a_model_is_left_out_of_the_parent_too() -> None:
    without, _ = leave_one_out(MADE[2:], parent=MADE[:3])
    assert without["Llama3-70B"].rows == ("a", "b", "d")


def test_an_interval_holds_its_constant() -> None:
    without, whole = leave_one_out(MADE)
    for name, (low, high) in intervals(whole, without).items():
        assert low <= getattr(whole.constants, name) <= high


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows given"):
        fit([])


def test_at_most_twelve_constants_each_with_its_rows_and_interval() -> None:
    record = json.loads(FILE.read_text())
    assert len(fields(Constants)) <= 12
    for name, fitted in record["fitted"].items():
        assert set(fitted["constants"]) == {item.name for item in fields(Constants)}, name
        for key, entry in fitted["constants"].items():
            if key == "launch_s":
                assert entry["rows"] == []
                continue
            assert entry["rows"] == fitted["rows"] != []
            assert entry["low"] <= entry["value"] <= entry["high"]


def figures() -> dict[str, Any]:
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def test_scored_and_fitted_rows_of_the_published_table_are_disjoint() -> None:
    record = figures()
    models = {row["id"]: row["model"] for row in record["rows"]}
    assert len(models) > 100
    groups = {name: gpu_of(name).like for name in {row["gpu"] for row in record["rows"]}}
    for row in record["rows"]:
        fitted = record["without"][groups[row["gpu"]]][row["model"]]
        assert row["id"] not in fitted
        assert row["model"] not in {models[other] for other in fitted}
        assert len(fitted) == row["num_fitted"]


def test_the_intervals_of_plans_are_the_errors_of_models_that_were_left_out() -> None:
    fitted = json.loads(FILE.read_text())["fitted"]
    rows = figures()["rows"]
    for name in ("H100", "H200", "GB200", "B300"):
        like = gpu_of(name).like
        # seconds measured over predicted; rows have tokens/s
        took = [r["predicted"] / r["measured"] for r in rows if gpu_of(r["gpu"]).like == like]
        known = hardware_of(name).step_error
        assert known is not None
        assert known.num_rows == len(took) == fitted[like]["step_error"]["num_rows"]
        assert known.num_models < known.num_rows
        # a percentile lies between two of the sorted rows
        outside = math.ceil(0.1 * (len(took) - 1))
        assert sum(share < 1 + known.low for share in took) == outside
        assert sum(share > 1 + known.high for share in took) == outside
        assert known.low < 0 < known.high


def test_the_published_errors_meet_the_bar() -> None:
    """n, 8 % median and 20 % at the 90th percentile over the newest Hopper rows: the goal."""
    newest = figures()["hopper"]["newest"]
    assert newest["n"] >= 50
    assert newest["median"] <= 0.08
    assert newest["p90"] <= 0.20


@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_formulas_predict_as_when_the_constants_were_fitted() -> None:
    """Fails at once when a formula changes and predictions with the file's constants worsen."""
    record = json.loads(FILE.read_text())["fitted"]
    table = fit_planner.sorted_rows(fit_planner.read_rows(ROWS))
    errors: list[float] = []
    for name in ("H100", "H100-96GB-HBM2e-500W"):
        values = {key: entry["value"] for key, entry in record[name]["constants"].items()}
        for row in table.newest[name]:
            step = predict_step(row.workload, hardware(row.gpu, Constants(**values)))
            errors.append(abs(math.log(step.tokens_per_s / row.tokens_per_s)))
    # 0.051 when it was fitted; a formula that worsens it by a tenth is to be fitted anew
    assert sorted(errors)[len(errors) // 2] <= 0.056


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not ROWS.exists(), reason=ABSENT)
def test_the_median_of_models_that_were_left_out_does_not_worsen() -> None:
    table = fit_planner.sorted_rows(fit_planner.read_rows(ROWS))
    scores = []
    for name in ("H100", "H100-96GB-HBM2e-500W"):
        parent = table.fitted.get(gpu_of(name).parent, [])
        without, _ = leave_one_out(table.fitted[name], parent=parent)
        scores += scored(table.newest[name], without)
    found = fit_planner.summary(scores)
    assert found["median"] <= figures()["hopper"]["newest"]["median"] + 0.002
    assert found["p90"] <= figures()["hopper"]["newest"]["p90"] + 0.005
