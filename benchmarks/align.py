"""Training an alignment from the store, compared with the bare optimizer step on a resident batch: rows per second, as
a ratio.

To reach: 0.8. Both are timed in turn in one run, medians of blocks of steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import torch

from mmkd.base.process import keep_freed_memory
from mmkd.benchmarks.result import Row, main
from mmkd.benchmarks.select import make_store
from mmkd.distill.alignment.closed_form import fit_pca, moments
from mmkd.distill.alignment.config import AlignConfig, AutoencoderSettings, JointSettings, PCASettings
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.trained import Batch, JointMaps, MultiTeacherAutoencoder, batches
from mmkd.store import FeatureStore

ROWS, BATCH, DIM, BLOCKS, STEPS = 4096, 256, 256, 5, 4


def step_of(model: torch.nn.Module, loss_of: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], None]:
    """One optimizer step on a batch."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def seconds_a_step(step: Callable[[Batch], None], source: Iterator[Batch]) -> float:
    """Of a few steps, batches included."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step(next(source))
    return (time.perf_counter() - started) / STEPS


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    keep_freed_memory()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", ROWS)
        config = AlignConfig.model_validate({"out": folder, "method": {"none": {}}, "dim": DIM})
        rows = AlignmentRows(FeatureStore.open(Path(folder) / "store"), config)
        endless = AutoencoderSettings(steps=10**6, batch_size=BATCH)
        device = torch.device("cpu")
        autoencoder = MultiTeacherAutoencoder(rows.widths, DIM, endless)
        measured = moments(rows, "tower")
        begin = {slug: fitted.weight for slug, fitted in fit_pca(rows, PCASettings(), DIM, 0).items()}
        joint = JointMaps(measured, begin, JointSettings().temperature)
        generator = torch.Generator().manual_seed(0)
        contenders = {
            "autoencoder": step_of(autoencoder, autoencoder.loss),
            "joint maps": step_of(joint, lambda batch: joint.loss(batch, generator)),
        }
        resident = repeat(rows.gather(rows.fit[:BATCH]))
        for name, step in contenders.items():
            stored = batches(rows, endless, 0, device)
            seconds_a_step(step, stored)
            bare, fed = [], []
            for _ in range(BLOCKS):
                bare.append(seconds_a_step(step, resident))
                fed.append(seconds_a_step(step, stored))
            ratio = statistics.median(b / f for b, f in zip(bare, fed, strict=True))
            what = f"training `{name}` of {len(rows.slugs)} teachers x {DIM} from the store"
            against = "the bare optimizer step on a resident batch"
            rates = (BATCH / statistics.median(taken) for taken in (fed, bare))
            found.append(
                Row(
                    what=what,
                    against=against,
                    value=next(rates),
                    reference=next(rates),
                    unit="rows/s",
                    ratio=ratio,
                    goal=">= 0.8",
                )
            )
            stored.close()
    return found


if __name__ == "__main__":
    main(measure)
