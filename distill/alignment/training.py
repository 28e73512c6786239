"""A loop on features alone: batches gathered one step ahead, AdamW, half a cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mmkd.base.errors import UserError
from mmkd.distill.alignment.config import TrainingSettings
from mmkd.distill.alignment.rows import AlignmentRows, TeacherRows
from mmkd.distill.batches import epoch_order

Batch = dict[str, TeacherRows]


def batches(
    rows: AlignmentRows, settings: TrainingSettings, seed: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of all steps, each gathered by a thread while the step before runs.

    The gather lets go of the interpreter, so it costs the step nothing but memory bandwidth.
    """
    size = min(settings.batch_size, len(rows.fit))
    per_epoch = len(rows.fit) // size

    def orders() -> Iterator[Future[Batch]]:
        for step in range(settings.steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = epoch_order(rows.fit, seed, epoch)
            yield pool.submit(rows.gather, order[place * size : (place + 1) * size], device)

    with ThreadPoolExecutor(1) as pool:
        waiting = orders()
        ahead = next(waiting)
        for following in waiting:
            yield ahead.result()
            ahead = following
        yield ahead.result()


def train(
    model: nn.Module,
    loss_of: Callable[[Batch], torch.Tensor],
    rows: AlignmentRows,
    settings: TrainingSettings,
    seed: int,
) -> None:
    """Minimise `loss_of` over the rows to fit on.

    Raises:
        UserError: the loss is not finite any more.
    """
    device = next(model.parameters()).device
    steps = settings.steps
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    decay = LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step, batch in enumerate(tqdm(batches(rows, settings, seed, device), total=steps, unit="step", disable=None)):
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        decay.step()
        # Looking at the loss waits for the device: not in every step.
        if (step % 50 == 0 or step + 1 == steps) and not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at step {step} of {steps}; lower method lr {settings.lr:g}")
