"""Training of heads: the same numbers on every run, early stopping, weights of the best epoch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from mmkd.base.arrays import Ints
from mmkd.evaluate.heads.settings import Trained, TrainingBudget


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Use one thread (sums depend on their number) and a seeded generator inside the block; restore both afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_until_worse(
    head: nn.Module,
    settings: TrainingBudget,
    rows: Ints,
    rng: np.random.Generator,
    loss: Callable[[Ints], torch.Tensor],
    validation: Callable[[], float],
) -> Trained:
    """Train until the validation loss has not fallen for a while; leave the best epoch's weights in `head`. rows: int64
    (n,), what each epoch goes through once. loss: of a batch of rows. validation: loss in evaluation mode."""
    epochs, patience = settings.limits(len(rows))
    # In one pass over the weights: torch's default takes one for each operation, longer than gradients do.
    optimizer = torch.optim.AdamW(head.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    lowest, best, weights = float("inf"), 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, epochs + 1):
        head.train()
        order = rng.permutation(rows)
        for start in range(0, len(order), settings.batch):
            value = loss(order[start : start + settings.batch])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        head.eval()
        with torch.no_grad():
            reached = validation()
        if reached < lowest:
            lowest, best, weights = reached, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best >= patience:
            break
    head.load_state_dict(weights)
    head.eval()
    return Trained(best, epochs)
