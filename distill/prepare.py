"""Everything a run needs before its first step, put together from its configuration."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmkd.base.errors import ConfigError, UserError
from mmkd.base.process import usable_cores
from mmkd.distill import checkpoint
from mmkd.distill.batch_norm import prepare_batch_norms, refuse_batch_norms
from mmkd.distill.batches import Batches, BatchPlan, Schedule
from mmkd.distill.captions import Tokenize
from mmkd.distill.checkpoint import Progress, State
from mmkd.distill.config import RunConfig
from mmkd.distill.fetch_ahead import open_store
from mmkd.distill.further_captions import OWN, TrainingCaptions, find_captions
from mmkd.distill.images import row_images, train_pictures
from mmkd.distill.monitor import Monitor, find_held_out, read_held_out
from mmkd.distill.objective import check_unpaired, make_objective
from mmkd.distill.optimizer import WeightAverage, lock_layers, make_optimizer, warmup_steps
from mmkd.distill.pairs import Pairs, PairSource, open_pairs
from mmkd.distill.policies import drawn_teacher
from mmkd.distill.provenance import RunRecord, make_record
from mmkd.distill.run import Run
from mmkd.distill.student import Towers, check_text, image_size, model_config, preprocessing
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.distill.terms import ONE_TOWER_TERMS
from mmkd.distill.train_step import Arithmetic, Model, Updater, count_arithmetic
from mmkd.distill.views import TrainingViews, find_views
from mmkd.distill.windows import find_windows, judged_rows
from mmkd.distill.world import World
from mmkd.store import FeatureStore


def prepare(config: RunConfig, world: World, scratch: Path | None = None) -> Run:
    """Open the store, build the student, and load the run's last checkpoint; with `scratch` nothing is written to the
    run's folder. Raises ConfigError, UserError, IncompleteStoreError if store and configuration do not fit;
    CorruptStoreError if a checkpoint is damaged."""
    share = _share(config, world)
    tokenizer = check_text(config.student.model)
    store = open_store(config, scratch)
    record = make_record(config, store, checkpoint.find_first_weights(config.student, config.out))
    state = checkpoint.load_last(config.out, record)
    # Rows first, because network and tokens take long: a wrong column is reported at once.
    slugs = _teachers(config, store)
    pairs = open_pairs(config.out, _pair_source(config, store, slugs, tokenizer, record), world, scratch)
    _check_rows(pairs, config, store)
    teachers = TeacherFeatures(store, slugs, taught=pairs.bits) if slugs else None
    views, choices = _find_views_and_captions(config, store, pairs, teachers, tokenizer)
    schedule = Schedule(len(pairs.rows), config.batch_size, config.epochs)
    warmup_steps(config.optimizer, schedule.total_steps)
    held_out = [find_held_out(entry, store, pairs, choices) for entry in config.monitor.sets]
    piece = min(config.compute.micro_batch or share, share)
    towers = _make_towers(config, state, pairs, world, share % piece or piece)
    _reside(teachers, config, world, store)
    arithmetic = _look_at_captions(towers, pairs, world, half=_half(config, world))
    workers = config.data.workers if config.data.workers is not None else default_workers()
    side = max(image_size(towers.student))
    pictures = row_images(store, pairs.places, "corpus" if views is not None else config.data.images, side)
    windows, ahead = find_windows(config, store, pairs, slugs, pictures, workers, views, choices)
    batches = Batches(
        plan=BatchPlan(pairs.rows, schedule, config.seed, windows),
        pairs=pairs,
        pictures=train_pictures(pictures, config.data, towers.student, world.device, views),
        choose=partial(drawn_teacher, config.seed) if _reads_one(config) else None,
        ahead=ahead,
        teachers=teachers,
        workers=workers,
        world=world,
        views=views,
        choices=choices,
    )
    width = int(model_config(config.student.model)["embed_dim"])
    objective = make_objective(
        config, width, teachers, *judged_rows(config, pairs, windows, teachers, ahead), world.device
    )
    model = Model(towers, objective.to(world.device))
    average = WeightAverage(towers, config.optimizer.average) if config.optimizer.average else None
    update = _make_updater(config, model, world)
    if state is not None:
        _restore(state, model, update, average)
    monitor = Monitor(
        config=config.monitor,
        sets=[read_held_out(rows, config.data, side, tokenizer) for rows in held_out],
        towers=towers,
        average=average,
        batch_rows=piece,
        workers=workers,
        world=world,
    )
    record = record.model_copy(update={"preprocess": asdict(preprocessing(towers.student))})
    progress, judge_before = state.progress if state else Progress(0, monitor.judge), ""
    if progress.judge != monitor.judge:
        # Scores of other rows, or by another metric, are not compared.
        progress, judge_before = Progress(progress.step, monitor.judge), progress.judge
    return Run(config, world, batches, update, average, monitor, record, progress, tokenizer, arithmetic, judge_before)


def _make_towers(config: RunConfig, state: State | None, pairs: Pairs, world: World, smallest: int) -> Towers:
    """Build the student as the run trains it; `smallest`: rows of the smallest piece of a step."""
    torch.manual_seed(config.seed)
    student = checkpoint.load_student(config.student, state)
    prepare_batch_norms(student, config.compute.batch_norm, world, smallest)
    towers = Towers(student).to(world.device)
    lock_layers(towers, config.student.lock)
    if "lone text" in pairs.counts:
        refuse_batch_norms(towers.train())
    return towers


def _share(config: RunConfig, world: World) -> int:
    """Return a rank's rows of a step. Raises ConfigError if ranks cannot have equal numbers."""
    share, left_over = divmod(config.batch_size, world.size)
    if left_over:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared equally by {world.size} ranks; "
            f"take {max(share, 1) * world.size}"
        )
    return share


def _restore(state: State, model: Model, update: Updater, average: WeightAverage | None) -> None:
    model.load_state_dict(state.part("model"))
    checkpoint.restore_optimizer(model, update.optimizer, state)
    if average is not None:
        for name, value in state.part("average").items():
            average.values[name].copy_(value)


def _reside(teachers: TeacherFeatures | None, config: RunConfig, world: World, store: FeatureStore) -> None:
    """Put the teachers' features on the device where that is asked for, or they fit; never those behind a URL."""
    if teachers is None or store.cache is not None:
        return
    if (wish := config.data.features) == "resident" or (wish == "auto" and teachers.fits(world.device)):
        teachers.reside(world.device)


def _find_views_and_captions(
    config: RunConfig, store: FeatureStore, pairs: Pairs, teachers: TeacherFeatures | None, tokenizer: Tokenize
) -> tuple[TrainingViews | None, TrainingCaptions | None]:
    """Return what stands for the rows' own images and captions. Raises UserError, IncompleteStoreError if the store, or
    a teacher in it, does not have them."""
    data, whole = config.data, pairs.all_paired  # then the rows stay mapped
    text, image = (pairs.rows if whole else pairs.rows[part >= 0] for part in pairs.groups.T)
    views = find_views(store, image) if data.views else None
    kinds = {kind for kind, weight in (data.captions or {}).items() if weight}
    choices = None if kinds == {OWN} else find_captions(store, text, data.captions, tokenizer)
    if views is not None and teachers is not None:
        teachers.check_rows("views", "image", views.rows[:, 0])
    if choices is not None and teachers is not None:
        teachers.check_rows("captions", "text", choices.choice_rows[choices.choices >= 0])
    return views, choices


def _reads_one(config: RunConfig) -> bool:
    """Return True if no loss compares a row with other rows as teachers see them that are not drawn for these."""
    alone = config.loss.mixed_teachers or set(config.loss.teacher_terms) <= ONE_TOWER_TERMS
    return config.policy.kind == "one" and config.loss.teacher_terms != () and alone


def _look_at_captions(towers: Towers, pairs: Pairs, world: World, *, half: bool) -> Arithmetic:
    """Check that padding can be left out of the text tower, and count the operations of a step."""
    captions = pairs.captions
    if len(probed := captions.spread(16)):
        towers.check_padding(captions.tokens(probed).to(world.device), captions.columns(probed))
    images, texts = (1 - pairs.counts.get(f"lone {part}", 0) / len(pairs.rows) for part in ("text", "image"))
    return count_arithmetic(towers, captions.context, world.size, half=half, images=images, texts=texts)


def _teachers(config: RunConfig, store: FeatureStore) -> tuple[str, ...]:
    """Return the teachers that losses ask. Raises UserError if there is none to ask."""
    if not config.loss.teacher_terms:
        return ()
    if not store.teachers:
        raise UserError(f"{store.root} has no teachers to learn from; `mmkd extract` adds them")
    return config.teachers or tuple(store.teachers)


def _pair_source(
    config: RunConfig, store: FeatureStore, slugs: tuple[str, ...], tokenizer: Tokenize, record: RunRecord
) -> PairSource:
    text = json.dumps([record.network["text_cfg"], record.text_files, record.versions["open_clip"]])
    selection = config.selection if slugs else None
    return PairSource(
        store, config.where, slugs, selection, tokenizer, text, record.source.selection, config.data.unpaired
    )


def _check_rows(pairs: Pairs, config: RunConfig, store: FeatureStore) -> None:
    """Raise UserError if the rows do not fill a batch; ConfigError if nothing learns from some of them."""
    check_unpaired(config, len(pairs.rows) - pairs.counts["pair"])
    if len(pairs.rows) < config.batch_size:
        having = " and have a teacher" if pairs.taught else ""
        raise UserError(
            f"{store.root}: {len(pairs.rows)} rows match {config.where or 'everything'}{having}, "
            f"fewer than one batch of {config.batch_size}; lower batch_size or change `where`"
        )


def default_workers() -> int:
    """Return decoding processes of a rank: the cores that the ranks of this machine may use, less one for each loop."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


def _make_updater(config: RunConfig, model: Model, world: World) -> Updater:
    compute = config.compute
    if compute.gradient_checkpointing:
        model.towers.student.set_grad_checkpointing()  # type: ignore[operator]
    called: nn.Module = model.towers
    if compute.compile:
        model.towers.compile()
    if world.size > 1:
        _freeze_unused(model.towers, world.device)
        called = DistributedDataParallel(called, device_ids=[world.device] if world.device.type == "cuda" else None)
    return Updater(
        model=model,
        called=called,
        optimizer=make_optimizer(model, config.optimizer),
        clip_norm=config.optimizer.clip_norm,
        world=world,
        dtype=torch.bfloat16 if _half(config, world) else torch.float32,
        micro_batch=compute.micro_batch,
        seed=config.seed,
    )


def _half(config: RunConfig, world: World) -> bool:
    precision = config.compute.precision
    return precision == "bf16" or (precision == "auto" and world.device.type == "cuda")


def _freeze_unused(towers: Towers, device: torch.device) -> None:
    """Take the gradient from parameters that no feature depends on, such as a text tower's own pooler.
    DistributedDataParallel would wait for theirs forever."""
    context = int(getattr(towers.student, "context_length", 0) or 16)
    towers.eval()
    images = torch.zeros(1, 3, *image_size(towers.student), dtype=torch.uint8, device=device)
    outputs = towers(images, torch.ones(1, context, dtype=torch.long, device=device))
    learned = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(torch.stack([output.sum() for output in outputs]).sum(), learned, allow_unused=True)
    for parameter, gradient in zip(learned, found, strict=True):
        parameter.requires_grad_(gradient is not None)
    towers.train()
