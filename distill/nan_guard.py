"""A loss or gradient that is not finite ends the run, with the batch named and nothing of it saved."""

from __future__ import annotations

import json

import torch

from mmkd.base.errors import UserError
from mmkd.base.files import write_atomically
from mmkd.distill.batch import Batch
from mmkd.distill.prepare import Run
from mmkd.distill.train_step import Outcome

BAD_BATCH = "bad-batch.json"


class FiniteGuard:
    """Looks at each step's loss when the next one is under way, so that the device never waits for the look."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.last: tuple[Batch, Outcome] | None = None

    def watch(self, batch: Batch, outcome: Outcome) -> None:
        """Judge the step before; this one is judged at the next call, or by `settle`."""
        before, self.last = self.last, (batch, outcome)
        self._judge(before)

    def settle(self) -> None:
        """Judge the last step too: before anything is written or measured.

        Raises:
            UserError: loss or gradient is NaN or infinite. The last checkpoint is from before.
        """
        before, self.last = self.last, None
        self._judge(before)

    def _judge(self, step: tuple[Batch, Outcome] | None) -> None:
        if step is None or step[1].finite():
            return
        batch, outcome = step
        # Every rank sees the same sums, so all come here together.
        rows = self.run.world.gather(torch.from_numpy(batch.rows).to(self.run.world.device)).tolist()
        if self.run.world.first:
            note = {"step": batch.step, "epoch": batch.epoch, "rows": rows} | {"losses": repr(outcome.values())}
            write_atomically(self.run.config.out / BAD_BATCH, json.dumps(note).encode())
        raise UserError(
            f"loss is {outcome.total.item()}, gradient norm {outcome.norm.item()} at step {batch.step} (epoch "
            f"{batch.epoch}), rows {', '.join(map(str, rows[:5]))}, ... (all in {self.run.config.out / BAD_BATCH}); "
            "lower optimiser.lr, or look at these rows; nothing was saved since the last checkpoint"
        )
