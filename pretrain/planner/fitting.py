"""Which constants do published measurements imply, and how well do they predict others?

The logarithms of constants are fitted to the logarithms of measured tokens/s by damped least
squares, with each constant held to its prior value by its prior width. Large residuals count less
(Huber), since releases differ by more than any error of a formula. What a fit is worth is asked by
leaving out one model at a time: its rows are predicted with constants that never saw it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pretrain.planner.hardware import PRIOR_WIDTH, Constants, Gpu, Hardware, StepError
from pretrain.planner.step_time import predict_step, ranged
from pretrain.planner.workload import Workload

ERROR_WIDTH = 0.06
"""Standard deviation of a residual that counts in full, as a logarithm."""
HUBER = 1.5
"""Residuals beyond so many widths count by their size, not by its square."""
ROUNDS = 6
"""Steps of a fit; the last ones move nothing."""
STEP = 0.02
"""Change of a constant's logarithm for a derivative."""

Floats = NDArray[np.float64]
NAMES = tuple(PRIOR_WIDTH)
"""Constants that are fitted."""
LIMITS: Mapping[str, float] = {"exposed": 1.0, "nvlink": 1.0, "network": 1.0, "memory": 1.0}
"""Largest value of constants that are shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A published measurement as a fit reads it."""

    row_id: str
    """Of the table."""
    model: str
    """What is left out together."""
    workload: Workload
    """The step."""
    gpu: Gpu
    """Its datasheet."""
    tokens_per_s: float
    """Measured, on each GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants and the rows they came from."""

    constants: Constants
    """Fitted; those no row depends on keep their prior value."""
    rows: tuple[str, ...]
    """Ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A row predicted by constants that were fitted without its model."""

    row: Measured
    """What was measured."""
    predicted: float
    """Tokens of a second on each GPU."""
    fitted_on: tuple[str, ...]
    """Ids of the rows behind the constants."""

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.row.tokens_per_s - 1


def fit(rows: Sequence[Measured], *, parent: Sequence[Measured] = ()) -> Fit:
    """Return the constants that rows imply.

    Args:
        rows: measurements of one GPU, or of GPUs that share constants.
        parent: measurements of the GPU whose constants these are held to; none: the prior values.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("no rows given; at least one is needed for a fit")
    prior = fit(parent).constants if parent else Constants()
    offsets = np.zeros(len(NAMES))
    widths = np.array([PRIOR_WIDTH[name] for name in NAMES])
    measured = np.log([row.tokens_per_s for row in rows])
    for _ in range(ROUNDS):
        predicted, bubbles = _predicted(rows, _moved(prior, offsets))
        slopes = _slopes(rows, prior, offsets, predicted, bubbles)
        residual = (measured - predicted) / ERROR_WIDTH
        weight = np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12)) ** 0.5
        design = np.vstack([slopes / ERROR_WIDTH * weight[:, None], np.diag(1 / widths)])
        target = np.concatenate([residual * weight, -offsets / widths])
        step = np.linalg.lstsq(design, target, rcond=None)[0]
        offsets = offsets + np.clip(step, -0.15, 0.15)
    return Fit(
        constants=_moved(prior, offsets),
        rows=tuple(sorted({row.row_id for row in (*rows, *parent)})),
    )


def _moved(prior: Constants, offsets: Floats) -> Constants:
    moved = {
        name: min(getattr(prior, name) * float(np.exp(offset)), LIMITS.get(name, np.inf))
        for name, offset in zip(NAMES, offsets, strict=True)
    }
    return replace(prior, **moved)


def _predicted(rows: Sequence[Measured], constants: Constants) -> tuple[Floats, list[float]]:
    """Return logarithms of tokens/s, and each pipeline's waiting over its passes."""
    found, bubbles = np.zeros(len(rows)), list[float]()
    for idx, row in enumerate(rows):
        step = predict_step(row.workload, hardware(row.gpu, constants))
        found[idx] = np.log(step.tokens_per_s)
        bubbles.append(step.bubble_s / step.passes.total_s)
    return found, bubbles


def _slopes(
    rows: Sequence[Measured],
    prior: Constants,
    offsets: Floats,
    predicted: Floats,
    bubbles: Sequence[float],
) -> Floats:
    slopes = np.zeros((len(rows), len(NAMES)))
    for column in range(len(NAMES)):
        moved = offsets.copy()
        moved[column] += STEP
        constants = _moved(prior, moved)
        for idx, (row, bubble) in enumerate(zip(rows, bubbles, strict=True)):
            step = predict_step(row.workload, hardware(row.gpu, constants), bubble_share=bubble)
            slopes[idx, column] = (np.log(step.tokens_per_s) - predicted[idx]) / STEP
    return slopes


def hardware(gpu: Gpu, constants: Constants) -> Hardware:
    """Return a GPU with constants that are being fitted."""
    return Hardware(gpu=gpu, constants=constants, fitted_range={})


def leave_one_out(
    rows: Sequence[Measured], *, parent: Sequence[Measured] = ()
) -> tuple[dict[str, Fit], Fit]:
    """Return, by model, the fit that never saw it, and the fit of all rows.

    A model is left out of the parent's rows, too.

    Args:
        rows: as `fit`.
        parent: as `fit`.
    """
    without: dict[str, Fit] = {}
    for model in dict.fromkeys(row.model for row in rows):
        others = [row for row in rows if row.model != model]
        other_parents = [row for row in parent if row.model != model]
        if others:
            without[model] = fit(others, parent=other_parents)
    return without, fit(rows, parent=parent)


def scored(rows: Sequence[Measured], without: Mapping[str, Fit]) -> list[Score]:
    """Return rows predicted by the fits that never saw their models."""
    scores: list[Score] = []
    for row in rows:
        if row.model in without:
            made = without[row.model]
            step = predict_step(row.workload, hardware(row.gpu, made.constants))
            scores.append(Score(row=row, predicted=step.tokens_per_s, fitted_on=made.rows))
    return scores


def step_error(scores: Sequence[Score]) -> StepError:
    """Return the percentiles of what rows took over what was predicted of them.

    Tokens/s predicted over measured are seconds measured over predicted.

    Args:
        scores: of rows predicted by fits that never saw their models; at least one.
    """
    low, high = np.quantile([score.error for score in scores], [0.1, 0.9])
    return StepError(
        low=float(low),
        high=float(high),
        num_rows=len(scores),
        num_models=len({score.row.model for score in scores}),
        gpus=tuple(sorted({score.row.gpu.name for score in scores})),
    )


def intervals(made: Fit, without: Mapping[str, Fit]) -> dict[str, tuple[float, float]]:
    """Return the 90 % interval of each constant from a jackknife over models.

    A fit without one of n models spreads by 1 / (n - 1) of what a new set of models would; the
    interval is in logarithms, 1.645 standard errors each way.
    """
    found: dict[str, tuple[float, float]] = {}
    num = len(without)
    for name in NAMES:
        value = getattr(made.constants, name)
        logs = np.log([getattr(other.constants, name) for other in without.values()])
        error = float(np.sqrt((num - 1) / num * np.sum((logs - logs.mean()) ** 2)))
        found[name] = (value * np.exp(-1.645 * error), value * np.exp(1.645 * error))
    return found


def fitted_range(rows: Sequence[Measured]) -> dict[str, tuple[float, float]]:
    """Return least and largest value of each quantity that `outside_range` asks for."""
    all_values = [ranged(row.workload) for row in rows]
    return {
        key: (min(values[key] for values in all_values), max(values[key] for values in all_values))
        for key in all_values[0]
    }
