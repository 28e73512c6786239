"""Training of heads: the same numbers on every run, early stopping, weights of the best epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmkd.evaluate.heads.settings import Trained

Steps = Callable[[], Iterator[torch.Tensor]]


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Use one thread and a seeded generator inside the block; restore both afterwards. Sums over several threads depend
    on their number."""
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
    optimizer: torch.optim.Optimizer,
    losses: Steps,
    validation: Callable[[], float],
    *,
    epochs: int,
    patience: int,
) -> Trained:
    """Train until the validation loss has not fallen for a while; leave the best epoch's weights in `head`.

    Args:
        head: network to train.
        optimizer: of its parameters.
        losses: gives one epoch's losses, scalars with gradients, a step each.
        validation: loss after an epoch, in evaluation mode.
        epochs: most epochs.
        patience: epochs without a lower loss before the end.
    """
    lowest, best, weights = float("inf"), 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, epochs + 1):
        head.train()
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        head.eval()
        with torch.no_grad():
            value = validation()
        if value < lowest:
            lowest, best, weights = value, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best >= patience:
            break
    head.load_state_dict(weights)
    head.eval()
    return Trained(best, epochs)
