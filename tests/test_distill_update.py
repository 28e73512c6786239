"""One step: the gradient is clipped, layers learn at their own rates, and every way to compute is really taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import parts
from tiny_run import in_ranks, quiet, write_run

from mmkd.distill.batches import Batch
from mmkd.distill.checkpoint import find_checkpoint, read
from mmkd.distill.config import OptimizerConfig, load_run
from mmkd.distill.optimizer import learning_rate_shares, set_learning_rate
from mmkd.distill.prepare import prepare
from mmkd.distill.run import Run
from mmkd.distill.train_step import Model, Outcome, Updater
from mmkd.distill.world import World

CPU = World(torch.device("cpu"))


def updated(model: Model, batch: Batch, clip_norm: float) -> tuple[Outcome, float]:
    """One step that moves nothing; its outcome, and the norm of the gradient that is left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    outcome = Updater(model, model.towers, optimizer, clip_norm, CPU, torch.float32, None, seed=0)(batch)
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return outcome, float(torch.cat(found).norm())


def test_the_whole_gradient_is_clipped_and_its_own_norm_is_told() -> None:
    model, batch = parts()
    free, norm = updated(model, batch, 1e9)
    assert free.norm.item() == pytest.approx(norm, rel=1e-5)
    clipped, left = updated(model, batch, norm / 4)
    assert clipped.norm.item() == pytest.approx(norm, rel=1e-5)
    assert left == pytest.approx(norm / 4, rel=1e-4)
    _, untouched = updated(model, batch, norm * 4)
    assert untouched == pytest.approx(norm, rel=1e-5)


def test_temperatures_stay_within_clips_limits() -> None:
    model, batch = parts()
    scales = [model.towers.log_scale, model.objective.cross_log_scales]
    for outside, limit in ((6.0, math.log(100)), (-1.0, 0.0)):
        with torch.no_grad():
            for scale in scales:
                scale.fill_(outside)
        updated(model, batch, 1.0)
        for scale in scales:
            assert torch.allclose(scale, torch.full_like(scale, limit))


def moved(path: Path, ranks: int) -> float:
    """How far a run's weights went from where they began."""
    config = load_run(path)
    began = {name: value.clone() for name, value in prepare(config, CPU).update.model.state_dict().items()}
    in_ranks(ranks, path)
    ended = read(find_checkpoint(config.out)).part("model")
    return max(float((ended[name] - value).abs().max()) for name, value in began.items())


def test_a_run_clips_at_the_norm_of_its_configuration(training_scene: Path, ranks: int) -> None:
    """AdamW divides by the gradient's own size, but for `eps`: a norm far below it leaves hardly a step."""
    plain = {"weight_decay": 0.0}
    free, tight = (
        write_run(training_scene, f"clip-{norm}-{ranks}", epochs=1, optimizer=plain | {"clip_norm": norm})
        for norm in (1.0, 1e-12)
    )
    assert moved(free, ranks) > 1e-3
    assert moved(tight, ranks) < 1e-8


def first_batch(run: Run) -> Batch:
    """Of an epoch."""
    return next(run.batches.from_step(0))


def test_every_layer_takes_its_share_of_the_learning_rate(training_scene: Path) -> None:
    """Adam's first step is the learning rate times the sign of the gradient, where that is far above `eps`."""
    changes: dict[str, Any] = {"layer_decay": 0.5, "eps": 1e-12, "weight_decay": 0.0}
    run = prepare(load_run(write_run(training_scene, "layers", optimizer=changes)), CPU)
    model = run.update.model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    set_learning_rate(run.update.optimizer, 1e-3)
    run.update(first_batch(run))
    shares = learning_rate_shares(model, OptimizerConfig(layer_decay=0.5))
    assert set(shares.values()) == {1.0, 0.5, 0.25}
    for name, value in model.named_parameters():
        steps = (value.detach() - before[name]).abs()[value.grad.abs() > 1e-8]  # type: ignore[union-attr]
        if len(steps):
            assert float(steps.median()) == pytest.approx(1e-3 * shares[name], rel=0.02), name


def saved_bytes(run: Run, batch: Batch) -> int:
    """What the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run.update.called(batch.images, batch.tokens, batch.columns)
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(training_scene: Path) -> None:
    found = []
    for on in (False, True):
        changes = {"gradient_checkpointing": on}
        run = prepare(load_run(write_run(training_scene, f"checkpointing-{on}", compute=changes)), CPU)
        batch = first_batch(run)
        size = saved_bytes(run, batch)
        run.update(batch)
        found.append((size, {n: p.grad for n, p in run.update.model.named_parameters() if p.grad is not None}))
    (plain, gradients), (less, again) = found
    # Weights are saved for the backward pass too, and stay.
    assert less < 0.9 * plain
    assert gradients.keys() == again.keys()
    for name, value in gradients.items():
        assert torch.allclose(value, again[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.integration
@pytest.mark.parametrize(
    "compute", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"micro_batch": 7}], ids=str
)
def test_ways_to_compute_give_nearly_the_same_losses(
    training_scene: Path, compute: dict[str, object], ranks: int
) -> None:
    name = "-".join(compute) + f"-{ranks}"
    plain = in_ranks(ranks, write_run(training_scene, f"plain-{name}", epochs=1)).losses
    other = in_ranks(ranks, write_run(training_scene, f"other-{name}", epochs=1, compute=compute)).losses
    tolerance = 0.03 if "precision" in compute else 1e-4
    assert other == pytest.approx(plain, rel=tolerance)
    assert ("precision" not in compute) or other != plain


@pytest.mark.slow
def test_compiled_towers_give_nearly_the_same_losses(training_scene: Path) -> None:
    counters = torch._dynamo.utils.counters["stats"]
    plain = quiet(write_run(training_scene, "eager", epochs=1)).losses
    assert counters["unique_graphs"] == 0
    compiled = quiet(write_run(training_scene, "compiled", epochs=1, compute={"compile": True})).losses
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert counters["unique_graphs"] >= 1
