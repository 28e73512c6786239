"""Training an alignment from the store, against the bare optimiser step on a resident batch: rows a second, as a ratio.

To reach: 0.8. Both are timed in turn in one run, medians of blocks of steps. `python -P benchmarks/align.py`.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import torch

from mmkd.distill.alignment.autoencoder import MultiTeacherAutoencoder
from mmkd.distill.alignment.config import AlignConfig, AutoencoderSettings, JointSettings, PCASettings
from mmkd.distill.alignment.joint import JointMaps
from mmkd.distill.alignment.moments import moments
from mmkd.distill.alignment.pca import fit_pca
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.training import Batch, batches
from mmkd.store import FeatureStore
from mmkd.store.malloc import keep_freed_memory

ROWS, BATCH, DIM, BLOCKS, STEPS = 4096, 256, 256, 5, 4


def step_of(model: torch.nn.Module, loss_of: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], None]:
    """One optimiser step on a batch."""
    optimiser = torch.optim.AdamW(model.parameters())

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(batch).backward()
        optimiser.step()

    return step


def seconds_a_step(step: Callable[[Batch], None], source: Iterator[Batch]) -> float:
    """Of a few steps, batches included."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step(next(source))
    return (time.perf_counter() - started) / STEPS


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    place = importlib.util.spec_from_file_location("select_benchmark", Path(__file__).with_name("select.py"))
    assert place is not None
    assert place.loader is not None
    stores = importlib.util.module_from_spec(place)
    place.loader.exec_module(stores)
    with tempfile.TemporaryDirectory() as folder:
        stores.make_store(Path(folder) / "store", ROWS)
        config = AlignConfig.model_validate({"out": folder, "method": {"none": {}}, "dim": DIM})
        rows = AlignmentRows(FeatureStore.open(Path(folder) / "store"), config)
        endless = AutoencoderSettings(steps=10**6, batch_size=BATCH)
        device = torch.device("cpu")
        autoencoder = MultiTeacherAutoencoder(rows.widths, DIM, endless)
        found = moments(rows, "tower")
        begin = {slug: fitted.weight for slug, fitted in fit_pca(rows, PCASettings(), DIM, 0).items()}
        joint = JointMaps(found, begin, JointSettings().temperature)
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
            print(
                f"{name:12} {BATCH / statistics.median(fed):8.0f} rows/s of {len(rows.slugs)} teachers from the store, "
                f"{ratio:.2f} of the bare step's",
                flush=True,
            )
            stored.close()


if __name__ == "__main__":
    main()
