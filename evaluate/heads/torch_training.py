"""What trained heads share: the same numbers on every run, early stopping, and the best epoch kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Steps = Callable[[], Iterator[torch.Tensor]]


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread and a seeded generator inside; both as they were afterwards.

    One thread, because sums over several depend on how many there are.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def adamw(head: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW in one pass over the weights: torch's default takes one for each operation, longer than gradients do."""
    return torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def train_until_worse(
    head: nn.Module,
    optimiser: torch.optim.Optimizer,
    losses: Steps,
    validation: Callable[[], float],
    limits: tuple[int, int],
) -> int:
    """Train until the validation loss has not fallen for a while; leave the best epoch's weights in `head`.

    Args:
        head: what is trained.
        optimiser: of its parameters.
        losses: gives one epoch's losses, scalars with gradients, a step each.
        validation: loss after an epoch, in evaluation mode.
        limits: most epochs, and epochs without a lower loss before the end.

    Returns:
        The epoch that was kept, from 1.
    """
    epochs, patience = limits
    best, kept, weights = float("inf"), 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, epochs + 1):
        head.train()
        for loss in losses():
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        head.eval()
        with torch.no_grad():
            value = validation()
        if value < best:
            best, kept, weights = value, epoch, copy.deepcopy(head.state_dict())
        elif epoch - kept >= patience:
            break
    head.load_state_dict(weights)
    head.eval()
    return kept
