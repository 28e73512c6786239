"""Losses of survival networks: Cox's partial likelihood and discrete hazards, and the risk that hazards mean."""

import warnings

import numpy as np
import torch
from torch.nn import functional
from torchsurv.loss.cox import neg_partial_log_likelihood

from mmkd.base.arrays import Bools, Floats, Ints
from mmkd.evaluate.heads.abmil import MilTask


def cox_loss(log_hazard: torch.Tensor, time: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log partial likelihood of the events of a batch, ties after Efron; zero without events.
    `log_hazard`: float (b, 1). `time`: float (b,). `event`: bool (b,)."""
    if not event.any():
        return log_hazard.sum() * 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ties in `time` detected", category=UserWarning)
        total: torch.Tensor = neg_partial_log_likelihood(log_hazard, event, time, ties_method="efron", reduction="sum")
    # torchsurv's own mean divides by the number of different event times, so that ties would weigh more.
    return total / event.sum()


def time_bins(time: Floats, event: Bools, bins: int) -> Floats:
    """Return inner edges, float64 (at most bins - 1,): quantiles of the event times of the training subjects. Published
    code takes them from test patients too (SurvPath); that leaks."""
    return np.unique(np.quantile(time[event], np.linspace(0, 1, bins + 1)[1:-1]))


def bin_of(time: Floats, edges: Floats) -> Ints:
    """Bin of every time, int64 (n,): bin b holds times in [edge b-1, edge b)."""
    return np.searchsorted(edges, time, side="right").astype(np.int64)


def hazard_nll(logits: torch.Tensor, bins: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log likelihood of discrete hazards, `logits` float (n, K), with `bins` int64 (n,) and
    `event` bool (n,): Zadeh and Schmid 2021, "Bias in cross-entropy-based training of deep survival networks", equation
    7, every subject with weight one."""
    survive, rows = functional.logsigmoid(-logits), torch.arange(len(bins))
    lived, here = torch.cumsum(survive, dim=1)[rows, bins], survive[rows, bins]
    died = functional.logsigmoid(logits)[rows, bins]
    return -torch.where(event, lived - here + died, lived).mean()


def risk_of_hazards(logits: Floats) -> Floats:
    """Minus the sum over bins of the chance to have lived through them, float64 (n,): higher means earlier."""
    return np.asarray(-np.cumprod(1 / (1 + np.exp(logits)), axis=1).sum(axis=1))


def cox_task(time: Floats, event: Bools) -> MilTask:
    """Return one log-hazard per bag; the risk set of a step is its batch."""
    times, events = torch.from_numpy(time), torch.from_numpy(event)
    return MilTask(1, lambda outputs, chosen: cox_loss(outputs, times[chosen], events[chosen]))


def hazard_task(time: Floats, event: Bools, seen: Ints, bins: int) -> MilTask:
    """Return hazards in bins whose edges come from the bags `seen` in training."""
    edges = time_bins(time[seen], event[seen], bins)
    places, events = torch.from_numpy(bin_of(time, edges)), torch.from_numpy(event)
    return MilTask(len(edges) + 1, lambda outputs, chosen: hazard_nll(outputs, places[chosen], events[chosen]))
