"""Calibration of probabilities: expected calibration error, Brier score with its parts, temperature scaling. Arrays and
weights are those of `mmkd.evaluate.metrics`; `score` holds probabilities."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from mmkd.base.arrays import Bools, Floats, Ints
from mmkd.evaluate.metrics import Labels, ratio, weighted_mean

SMALLEST = np.finfo(np.float64).tiny
"""Stands for a probability of zero, whose logarithm does not exist."""
REACH = 8.0
"""The logarithm of a temperature is sought within this distance of zero: 0.0003 to 3000."""


def events(y: Labels, score: Floats) -> tuple[Floats, Bools]:
    """Return the probability to be calibrated, float64 (n,), and whether its event happened, bool (n,): of two classes
    the second, of more the class with the highest score."""
    if score.shape[1] == 2:
        return score[:, 1], y == 1
    return score.max(axis=1), score.argmax(axis=1) == y


def lower_edges(probability: Floats, bins: int, equal_mass: bool) -> Floats:
    """Return lower edges of bins, float64 (at most bins,): of equal width, or at quantiles (equal values share one)."""
    edges = np.linspace(0, 1, bins + 1)[:-1]
    return np.unique(np.quantile(probability, edges)) if equal_mass and len(probability) else edges


def bin_of(probability: Floats, edges: Floats) -> Ints:
    """Return the bin of every probability, int64 (n,); a bin holds its lower edge."""
    return np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, None).astype(np.int64)


def calibration_error(
    probability: Floats, happened: Bools, weights: Floats, bins: int, *, equal_mass: bool = False
) -> Floats:
    """Return the expected calibration error (Naeini, Cooper and Hauskrecht 2015; Guo et al. 2017, equation 3): the mean
    distance of mean probability and share of events over bins, weighted by their samples. Bins are those of the samples
    themselves in all resamples."""
    edges = lower_edges(probability, bins, equal_mass)
    gaps = _by_bin(probability - happened, bin_of(probability, edges), len(edges))
    return ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def brier(y: Labels, score: Floats, weights: Floats) -> Floats:
    """Return the Brier score (Brier 1950): the mean over samples of the squared distances of probabilities and
    outcomes, summed over the classes; with two classes of the second alone, as scikit-learn's `brier_score_loss`."""
    return weighted_mean(np.sum([(p - o) ** 2 for p, o in _outcomes(y, score)], axis=0), weights)


def brier_parts(y: Labels, score: Floats, weights: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Return reliability, resolution and uncertainty, float64 (B,) each, summed over the classes as in `brier`; the
    Brier score is reliability - resolution + uncertainty (Murphy 1973). Bins are of equal width. The resolution takes
    in what varies within bins (Stephenson, Coelho and Jolliffe 2008, equation 12), so that this holds exactly."""
    edges, total = np.linspace(0, 1, bins + 1)[:-1], weights.sum(axis=1)
    reliability, uncertainty = np.zeros(len(weights)), np.zeros(len(weights))
    for p, o in _outcomes(y, score):
        place = bin_of(p, edges)
        gap, size = weights @ _by_bin(p - o, place, bins), weights @ _by_bin(np.ones(len(p)), place, bins)
        reliability += np.nansum(ratio(gap**2, size), axis=1)
        share = weighted_mean(o, weights)
        uncertainty += share * (1 - share)
    reliability = ratio(reliability, total)
    return reliability, reliability + uncertainty - brier(y, score, weights), uncertainty


def scaled(score: Floats, temperature: float) -> Floats:
    """Return probabilities, float64 (n, C), of logits divided by a temperature (Guo et al. 2017, section 4.2)."""
    return np.asarray(softmax(np.log(np.maximum(score, SMALLEST)) / temperature, axis=1))


def best_temperature(y: Labels, score: Floats) -> float:
    """Return the temperature with the lowest log-loss of these samples, within exp(±`REACH`)."""
    logits, rows = np.log(np.maximum(score, SMALLEST)), np.arange(len(y))

    def loss(sharpness: float) -> float:
        return float(-log_softmax(logits * np.exp(sharpness), axis=1)[rows, y].mean())

    # Convex in the factor on the logits, so with a single minimum in its logarithm.
    found = minimize_scalar(loss, bounds=(-REACH, REACH), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(-found.x))


def _outcomes(y: Labels, score: Floats) -> list[tuple[Floats, Floats]]:
    """Probability and outcome of each class, float64 (n,); of two classes the second's alone."""
    classes = range(score.shape[1]) if score.shape[1] != 2 else (1,)
    return [(score[:, c], (y == c).astype(np.float64)) for c in classes]


def _by_bin(values: Floats, place: Ints, bins: int) -> Floats:
    """One column for each bin, float64 (n, bins), which holds the values of its samples and zeros."""
    columns = np.zeros((len(values), bins))
    columns[np.arange(len(values)), place] = values
    return columns
