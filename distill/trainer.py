"""The loop, and nothing but the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mmkd.distill import checkpoint
from mmkd.distill.config import LossWeights, OptimiserConfig, RunConfig
from mmkd.distill.losses import cross_loss, feature_loss, task_loss
from mmkd.distill.order import Schedule
from mmkd.distill.pairs import image_batches, training_pairs
from mmkd.distill.student import Distilled, build_student, model_config, student_tokenizer, train_transform
from mmkd.distill.teacher_features import TeacherBatch, TeacherFeatures
from mmkd.store import FeatureStore
from mmkd.store.atomic import write_atomically
from mmkd.store.errors import UserError
from mmkd.store.malloc import keep_freed_memory

_LOG_EVERY = 10
# CLIP clips its temperature at 100 (arXiv 2103.00020, section 2.5).
_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class TrainReport:
    """What a run did."""

    steps: int
    resumed_at: int
    """Step at which this call began."""
    rows: int
    parameters: int
    """Of the student alone."""
    seconds: float
    wait_seconds: float
    """Of them, spent waiting for images and features."""
    losses: dict[str, float]
    """Of the last step, by term."""


def train(config: RunConfig, say: Callable[[str], None] = print) -> TrainReport:
    """Train the student of `config`, from its checkpoint when there is one.

    Raises:
        ConfigError, UserError, IncompleteStoreError: see `mmkd.store.errors`. A loss that is not finite
        stops the run with the step and its first rows named.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    store = FeatureStore.open(config.store)
    teachers = TeacherFeatures(store, config.teachers or tuple(store.teachers))
    student = build_student(config.student)
    pairs = training_pairs(store, config, teachers.available(), student_tokenizer(config.student))
    model = Distilled(student, model_config(config.student.model)["embed_dim"], teachers.dims)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions like it
    schedule = Schedule(len(pairs.rows), config.batch_size, config.epochs)
    optimiser = make_optimiser(model, config.optimiser)
    decay = LambdaLR(optimiser, lambda step: lr_factor(step, config.optimiser.warmup_steps, schedule.total_steps))
    first = _restore(config, model, optimiser, decay)
    write_atomically(config.out / checkpoint.CONFIG, config.model_dump_json(indent=1).encode())
    parameters = sum(parameter.numel() for parameter in student.parameters())
    say(
        f"{len(pairs.rows):,} pairs, {len(teachers.slugs)} teachers, student of {parameters / 1e6:.1f} M parameters, "
        f"{schedule.total_steps:,} steps on {device}" + (f", from step {first:,}" if first else "")
    )
    batches = image_batches(pairs, config, train_transform(student, config.crop_scale), schedule, first)
    started, wait, losses = time.perf_counter(), 0.0, {}
    with (
        SummaryWriter(str(config.out / "tensorboard"), purge_step=first) as board,
        tqdm(total=schedule.total_steps, initial=first, unit="step", disable=None) as bar,
    ):
        for step in range(first, schedule.total_steps):
            before = time.perf_counter()
            batch = next(batches)
            targets = teachers.gather(batch.rows, device)
            groups = torch.from_numpy(pairs.group[batch.rows])
            wait += time.perf_counter() - before
            terms = loss_terms(
                model, batch.images.to(device), pairs.tokens[groups].to(device), groups.to(device), targets
            )
            total = weighted(terms, config.loss)
            if not torch.isfinite(total):
                raise UserError(
                    f"loss is {total.item()} at step {step}, rows {batch.rows[:8].tolist()}...; lower the lr"
                )
            update(model, total, optimiser, config.optimiser.clip_norm)
            decay.step()
            bar.update()
            if step % _LOG_EVERY == 0 or step + 1 == schedule.total_steps:
                losses = {name: term.item() for name, term in terms.items()} | {"total": total.item()}
                _log(board, bar, step, losses, float(decay.get_last_lr()[0]), wait / (time.perf_counter() - started))
            if (step + 1) % config.checkpoint_steps == 0 or step + 1 == schedule.total_steps:
                checkpoint.save(config, model, optimiser, decay, step + 1)
    seconds = time.perf_counter() - started
    return TrainReport(schedule.total_steps, first, len(pairs.rows), parameters, seconds, wait, losses)


def loss_terms(
    model: Distilled, images: torch.Tensor, tokens: torch.Tensor, groups: torch.Tensor, targets: list[TeacherBatch]
) -> dict[str, torch.Tensor]:
    """The terms before weighting; those of the teachers are means over the teachers that have the batch's rows."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        image, text = model(images, tokens)
    feature, cross = [], []
    for head, log_scale, target in zip(model.heads, model.cross_log_scales, targets, strict=True):
        if len(target.members) < 2:  # one row has nothing to be contrasted with
            continue
        s_image, s_text = head(image[target.members].float()), head(text[target.members].float())
        feature.append(feature_loss(s_image, target.image) + feature_loss(s_text, target.text))
        cross.append(cross_loss(s_image, s_text, target.image, target.text, log_scale.exp(), groups[target.members]))
    zero = image.new_zeros((), dtype=torch.float32)
    return {
        "task": task_loss(image, text, model.scale, groups),
        "feature": torch.stack(feature).mean() if feature else zero,
        "cross": torch.stack(cross).mean() if cross else zero,
    }


def weighted(terms: dict[str, torch.Tensor], weights: LossWeights) -> torch.Tensor:
    """The sum that is minimised."""
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()


def update(model: Distilled, total: torch.Tensor, optimiser: torch.optim.Optimizer, clip_norm: float) -> None:
    """One optimiser step; temperatures are kept within CLIP's limits."""
    optimiser.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimiser.step()
    with torch.no_grad():
        model.student_log_scale.clamp_(0, _MAX_LOG_SCALE)
        model.cross_log_scales.clamp_(0, _MAX_LOG_SCALE)


def make_optimiser(model: torch.nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at `step`: linear up over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _restore(config: RunConfig, model: Distilled, optimiser: torch.optim.Optimizer, decay: LambdaLR) -> int:
    state = checkpoint.load(config)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    decay.load_state_dict(state["decay"])
    return int(state["step"])


def _log(board: SummaryWriter, bar: tqdm, step: int, losses: dict[str, float], lr: float, wait: float) -> None:  # type: ignore[type-arg]
    for name, value in losses.items():
        board.add_scalar(f"loss/{name}", value, step)
    board.add_scalar("lr", lr, step)
    board.add_scalar("data_wait_share", wait, step)
    bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()} | {"wait": f"{wait:.0%}"})
