"""How each task is run: one frozen model per task, with the defaults that the documentation argues for.

The field names of `TaskSettings` are the task names; `mmkd.evaluate.tasks.TASKS` has one object for each.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mmkd.base.config import Frozen


class BootstrapSettings(Frozen):
    """Percentile intervals from resampled groups (patients when the data set names them, else samples)."""

    n: int = Field(default=1000, ge=100)
    """Resamples. 1000 settles the second digit of a 95 % limit; use 5000 for a paper."""
    seed: int = Field(default=42, ge=0)
    level: float = Field(default=0.95, gt=0.5, lt=1.0)


class ZeroShotSettings(Frozen):
    """Zero-shot classification by the nearest class text."""

    protocol: Literal["standard", "mmkd_official"] = "standard"
    """`mmkd_official` scores as the code released with MMKD-CLIP does, quirks included (see `official.py`)."""
    temperature: float = Field(default=100.0, gt=0)
    """Factor on the cosines before the softmax. One fixed value for all models: a model's own scale would make
    their macro AUROC incomparable. 100 is where CLIP clips its learned scale. The official protocol uses 1."""
    primary: str | None = None
    """Metric that tables show when none is named; by default the protocol's own choice."""


class MultilabelZeroShotSettings(Frozen):
    """Zero-shot classification with several labels a sample: every label for itself."""

    temperature: float = Field(default=100.0, gt=0)
    """Factor on the difference of positive and negative cosine before the logistic function, as in `zero_shot`.
    Without negative prompts the score is the bare cosine; the metrics look at the order within a label only."""
    primary: str | None = None


class LinearProbeSettings(Frozen):
    """Logistic regression on unit features, its strength chosen on validation data for every model."""

    c_low: float = Field(default=1e-4, gt=0)
    c_high: float = Field(default=1e6, gt=0)
    c_steps: int = Field(default=21, ge=1)
    """Logarithmic grid of scikit-learn's C. On unit features one fixed C would measure feature scale."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels (training and validation alike), drawn per class, at least one of each."""
    seeds: int = Field(default=5, ge=1)
    """Draws of each share below 1."""
    fallback_c: float = Field(default=10.0, gt=0)
    """C when there is nothing to validate on: no class has two groups to divide."""
    max_iter: int = Field(default=1000, ge=1)
    max_train: int = Field(default=100_000, ge=2)
    """Cap on training rows, drawn per class; the number used stands in every result."""
    primary: str | None = None

    @model_validator(mode="after")
    def _grid_and_shares_make_sense(self) -> LinearProbeSettings:
        if self.c_low > self.c_high:
            raise ValueError(f"c_low {self.c_low:g} is above c_high {self.c_high:g}")
        wrong = [share for share in self.fractions if not 0 < share <= 1]
        if wrong or not self.fractions:
            raise ValueError(f"fractions must be within (0, 1], got {wrong or 'none'}")
        return self

    def grid(self) -> NDArray[np.float64]:
        """The values of C to try, ascending, float64 (c_steps,)."""
        return np.logspace(np.log10(self.c_low), np.log10(self.c_high), self.c_steps)


class RetrievalSettings(Frozen):
    """Cross-modal retrieval in both directions."""

    ks: tuple[int, ...] = (1, 5, 10, 50)
    positives: Literal["pair", "image", "image+caption"] = "image+caption"
    """What counts as found. `pair`: only the caption of the same row. `image`: any caption of the same image bytes.
    `image+caption`: also any image with the same normalised caption; queries and gallery hold each only once."""
    primary: str | None = None

    @model_validator(mode="after")
    def _ks_are_ranks(self) -> RetrievalSettings:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be one or more ranks from 1 on, got {list(self.ks)}")
        return self


class MilSettings(Frozen):
    """Attention-based multiple-instance learning (Ilse et al. 2018) as CLAM-style pipelines train it."""

    hidden: int = Field(default=512, ge=1)
    attention: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.25, ge=0, lt=1)
    lr: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=1e-5, ge=0)
    epochs: int = Field(default=50, ge=1)
    patience: int = Field(default=10, ge=1)
    """Epochs without a lower validation loss before training stops; the best epoch is kept."""
    batch: int = Field(default=16, ge=1)
    """Bags a step."""
    max_patches: int = Field(default=4096, ge=1)
    """Patches drawn of a larger bag in each training step; a test bag is always whole."""


class CoxnetSettings(Frozen):
    """Elastic-net Cox regression on mean-pooled features."""

    l1_ratio: float = Field(default=0.5, gt=0, le=1)
    alphas: int = Field(default=20, ge=1)
    smallest_alpha: float = Field(default=0.05, gt=0, lt=1)
    """The path ends at this share of the smallest penalty that leaves no coefficient."""
    inner_folds: int = Field(default=5, ge=2)


class SurvivalSettings(Frozen):
    """Survival from bags of features, cross-validated by patients."""

    heads: tuple[Literal["coxnet", "abmil_cox", "abmil_nll"], ...] = ("coxnet", "abmil_cox", "abmil_nll")
    tower: Literal["image", "text"] = "image"
    """Which features describe a patient; `text` for clinical notes or reports in the caption column."""
    folds: int = Field(default=5, ge=2)
    seeds: int = Field(default=5, ge=1)
    """Draws of the folds (published folds stay) and of the heads' first weights."""
    bins: int = Field(default=4, ge=2)
    """Time bins of `abmil_nll`: quantiles of the training patients' event times."""
    coxnet: CoxnetSettings = CoxnetSettings()
    mil: MilSettings = MilSettings()
    primary: str | None = None


class DiagnosisSettings(Frozen):
    """A diagnosis from bags of patches, cross-validated by patients or on the suite's own splits."""

    heads: tuple[Literal["mean_pool", "abmil"], ...] = ("mean_pool", "abmil")
    folds: int = Field(default=5, ge=2)
    seeds: int = Field(default=3, ge=1)
    mil: MilSettings = MilSettings()
    probe: LinearProbeSettings = LinearProbeSettings()
    """How `mean_pool` chooses the strength of its logistic regression; shares and seeds in it are not used."""
    primary: str | None = None


class VqaSettings(Frozen):
    """Visual question answering with pooled features: for comparing encoders, not with fine-tuned fusion models."""

    heads: tuple[Literal["fusion_mlp", "rank"], ...] = ("fusion_mlp",)
    """`rank` needs candidate rows in the store and is not trained."""
    vocabulary: Literal["train", "all"] = "train"
    """`all` adds the test answers, as published numbers often do; the coverage is then 1 by construction."""
    seeds: int = Field(default=5, ge=1)
    hidden: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    epochs: int = Field(default=50, ge=1)
    patience: int = Field(default=5, ge=1)
    batch: int = Field(default=128, ge=1)
    primary: str | None = None


class TaskSettings(Frozen):
    """Settings of every task; the field names are the names of the tasks."""

    zero_shot: ZeroShotSettings = ZeroShotSettings()
    linear_probe: LinearProbeSettings = LinearProbeSettings()
    multilabel_zero_shot: MultilabelZeroShotSettings = MultilabelZeroShotSettings()
    multilabel_probe: LinearProbeSettings = LinearProbeSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    vqa: VqaSettings = VqaSettings()
    survival: SurvivalSettings = SurvivalSettings()
    diagnosis: DiagnosisSettings = DiagnosisSettings()
