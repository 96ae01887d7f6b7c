"""Non-negative least squares that a few outliers cannot bend."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

ROUNDS = 5
OUTLIER = 8.0
"""Standard deviations, told from the median deviation, from which a value counts as an outlier."""
LEAST_OUTLIER = 0.2
"""Relative: nothing nearer than this is one, however well the rest fits."""
MOST_OUTLIERS = 0.1
"""Share of the values that may be left out."""
FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Of predictions for values that the fit had not seen."""

    mape: float
    """Mean absolute relative error of a value, outliers left out."""
    total: float
    """Relative error of the sum, outliers included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """value = features @ coefficients; nothing is negative."""

    names: tuple[str, ...]
    coefficients: np.ndarray

    def predict(self, features: Sequence[object]) -> np.ndarray:
        """One value for each entry of the features, which are numbers or arrays of one length."""
        return _columns(features) @ self.coefficients

    def predict_one(self, *features: float) -> float:
        """For a step loop: a tenth of the time of `predict`."""
        return float(sum(map(operator.mul, self.coefficients.tolist(), features)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fit, and the values it was made to."""

    fit: Fit
    outliers: np.ndarray
    """bool [values]"""
    residuals: np.ndarray
    """[values] measured minus predicted"""


def fit(
    names: tuple[str, ...],
    features: Sequence[object],
    values: np.ndarray,
    *,
    doubted: Mapping[str, float] = MappingProxyType({}),
    never_outliers: np.ndarray | None = None,
) -> Fitted:
    """Fits `values` [n] to `features`, each a number or an array [n].

    Of each `doubted` name one more value, as small as most and of the weight given, says that as much as there ever
    was of it costs nothing: where the others explain as much, they are believed. `never_outliers` [n] are few and
    unlike the rest, and still believed.
    """
    columns = _columns(features, len(values))
    doubts = np.array([doubted.get(name, 0.0) for name in names])
    coefficients, keep = _robust(columns, values, doubts, never_outliers)
    found = Fit(names=names, coefficients=coefficients)
    return Fitted(fit=found, outliers=~keep, residuals=values - columns @ coefficients)


def held_out_error(
    names: tuple[str, ...],
    features: Sequence[object],
    values: np.ndarray,
    *,
    num_warm_up: int = 0,
    doubted: Mapping[str, float] = MappingProxyType({}),
) -> Error:
    """Each of FOLDS parts is predicted by a fit on the others; the values that warm up are in none."""
    columns, values = _columns(features, len(values))[num_warm_up:], values[num_warm_up:]
    if len(values) < 2 * FOLDS:
        return Error(mape=np.nan, total=np.nan)
    predicted = np.empty(len(values))
    part = np.arange(len(values)) % FOLDS
    for fold in range(FOLDS):
        rest = part != fold
        one = fit(names, tuple(columns[rest].T), values[rest], doubted=doubted)
        predicted[~rest] = columns[~rest] @ one.fit.coefficients
    keep = ~fit(names, tuple(columns.T), values, doubted=doubted).outliers & (values > 0)
    relative = np.abs(predicted[keep] / values[keep] - 1)
    return Error(mape=float(relative.mean()), total=float(predicted.sum() / values.sum() - 1))


def _columns(features: Sequence[object], length: int | None = None) -> np.ndarray:
    arrays = [np.atleast_1d(np.asarray(feature, np.float64)) for feature in features]
    length = length or max(len(array) for array in arrays)
    return np.stack([np.broadcast_to(array, length) for array in arrays], axis=1)


def _robust(
    columns: np.ndarray, values: np.ndarray, doubts: np.ndarray, never_outliers: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients, bool [values]: which of them they were fitted to)"""
    # Weighted so that each value counts by its relative error times its size: the sum is what has to be right.
    floor = max(float(np.median(values)) * 1e-3, 1e-9)
    weights = 1 / np.sqrt(np.maximum(values, floor))
    nothing = np.diag(columns.max(axis=0) * float(np.median(weights)) * doubts)[doubts > 0]
    keep = np.ones(len(values), np.bool_)
    coefficients = np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        coefficients = _non_negative(
            np.concatenate([columns[keep] * weights[keep, None], nothing]),
            np.concatenate([values[keep] * weights[keep], np.zeros(len(nothing))]),
        )
        predicted = columns @ coefficients
        relative = np.abs(values - predicted) / np.maximum(predicted, floor)
        limit = max(OUTLIER * 1.4826 * float(np.median(relative)), LEAST_OUTLIER, _quantile(relative))
        before, keep = keep, relative <= limit
        if never_outliers is not None:
            keep |= never_outliers
        if (keep == before).all():
            break
    return coefficients, keep


def _quantile(relative: np.ndarray) -> float:
    return float(np.quantile(relative, 1 - MOST_OUTLIERS))


def _non_negative(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls  # takes a third of a second to import

    largest = np.abs(columns).max(axis=0)
    largest[largest == 0] = 1.0
    coefficients, _ = nnls(columns / largest, values, maxiter=1000)
    return coefficients / largest
