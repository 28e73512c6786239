"""One training run, as `mmkd distill RUN.yaml` reads it. Paths are relative to the YAML file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mmkd.store.yaml_config import Frozen, read_mapping, validated


class StudentConfig(Frozen):
    """The network to train: an open_clip model from its own initialisation."""

    model: str
    """Name that open_clip knows (`ViT-B-16`), or path of an open_clip model config (`.json`)."""
    pretrained: str = ""
    """Weights to start from, as open_clip names them; empty for random ones."""


class LossWeights(Frozen):
    """`total = task * task_loss + feature * feature_loss + cross * cross_loss`; see `mmkd.distill.losses`."""

    task: float = Field(default=1.0, ge=0)
    feature: float = Field(default=1.0, ge=0)
    cross: float = Field(default=1.0, ge=0)


class OptimiserConfig(Frozen):
    """AdamW with linear warm-up and cosine decay to zero, as CLIP is trained (arXiv 2103.00020, table 18)."""

    lr: float = Field(default=5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    """Of matrices; biases, norms and temperatures are not decayed."""
    warmup_steps: int = Field(default=100, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""


class RunConfig(Frozen):
    """Everything that decides the outcome of a run."""

    store: Path
    out: Path
    """Run folder: checkpoint, TensorBoard events, the config itself."""
    student: StudentConfig
    teachers: tuple[str, ...] = ()
    """Slugs to learn from; empty for all in the store."""
    where: dict[str, str] = Field(default_factory=dict)
    """Rows to train on: sample column to value, for example {split: train}. Empty for all rows."""
    epochs: int = Field(default=10, gt=0)
    batch_size: int = Field(default=256, gt=1)
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the picture that a training crop keeps, as in MMKD-CLIP's training."""
    loss: LossWeights = LossWeights()
    optimiser: OptimiserConfig = OptimiserConfig()
    seed: int = 0
    loader_workers: int = Field(default=2, ge=0)
    """Processes that read and decode images; the result does not depend on it."""
    checkpoint_steps: int = Field(default=500, gt=0)
    """Steps between checkpoints; one more is written at the end."""


def load_run(path: Path) -> RunConfig:
    """Read a run's YAML; relative paths in it are taken from its own folder.

    Raises:
        ConfigError: unreadable, or a key that is unknown or does not fit.
    """
    config = validated(RunConfig, read_mapping(path), path)
    here = path.resolve().parent
    student = config.student
    if student.model.endswith(".json"):
        student = student.model_copy(update={"model": str(here / student.model)})
    return config.model_copy(update={"store": here / config.store, "out": here / config.out, "student": student})
