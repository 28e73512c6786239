"""One training run, as `mmkd distill RUN.yaml` reads it. Paths are relative to the YAML file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictStr,
    create_model,
)

from mmkd.base.config import Frozen, read_mapping, validated, without_repeats
from mmkd.distill.presets import SCHEMES, compose
from mmkd.distill.terms import DEFAULT_WEIGHTS, TERMS, FeatureKind

Share = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], AfterValidator(without_repeats)]


def _refuse_mapping(value: object) -> object:
    if not isinstance(value, dict):
        return value
    quoted = {name: "'" + one.replace("'", "''") + "'" if isinstance(one, str) else one for name, one in value.items()}
    text = " and ".join(f"{name} = {one}" for name, one in quoted.items())
    raise ValueError(f'is a mapping, expected a condition as text: "{text}"')


Condition = Annotated[StrictStr, BeforeValidator(_refuse_mapping)]
"""Condition on sample columns as after SQL's WHERE (`mmkd.base.conditions`): `split = 'train' and width >= 224`."""


def _path_or_url(place: Path | str) -> Path | str:
    return place if "://" in str(place) else Path(place)


class TowerWeights(Frozen):
    """First weights of each tower by itself; empty for random ones."""

    image: str = ""
    text: str = ""


class LockConfig(Frozen):
    """Layers that do not learn: `all` of a tower (LiT, arXiv 2111.07991), or its stem and so many layers above it.
    Batch norms of locked layers use their running statistics."""

    image: Literal["all"] | NonNegativeInt = 0
    text: Literal["all"] | NonNegativeInt = 0


class PreprocessConfig(Frozen):
    """Preprocessing overrides; `None` uses the initial weights' settings."""

    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None


class StudentConfig(Frozen):
    """The network to train: an open_clip model, from random weights, from released ones or from an earlier run."""

    model: str
    """Name that open_clip knows (`ViT-B-16`), path of an open_clip model config (`.json`), or an open_clip folder with
    weights (`local-dir:FOLDER`, such as an exported student, or `hf-hub:ORG/NAME`)."""
    pretrained: str | TowerWeights = ""
    """First weights, of both towers or of each (`{image: ..., text: ...}`): a tag of open_clip, a file, an open_clip
    folder (`local-dir:`, `hf-hub:`), or for one tower a timm or transformers folder; empty for random ones."""
    start_from: Path | None = None
    """Run folder whose best (else last) checkpoint gives the first weights: stage 1 for stage 2."""
    lock: LockConfig = LockConfig()
    preprocess: PreprocessConfig = PreprocessConfig()

    def faults(self) -> Iterator[str]:
        if self.pretrained and self.start_from is not None:
            yield "`pretrained` and `start_from` both name weights to begin with; keep one"
        if self.model.startswith(SCHEMES) and self.pretrained:
            yield f"`model: {self.model}` brings its own weights; leave `pretrained` out"


class PartRates(Frozen):
    """Factors of the learning rate; 1 for no change."""

    image: PositiveFloat = 1.0
    text: PositiveFloat = 1.0
    heads: PositiveFloat = 1.0
    """Of everything but the student."""


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and cosine decay to zero, as CLIP is trained (arXiv 2103.00020, table 18)."""

    lr: PositiveFloat = 5e-4
    part_rates: PartRates = PartRates()
    """Factor of the learning rate of each part, beside `layer_decay`."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.2
    """Applied to matrices; biases, norms, positions, class tokens, layer scales and temperatures are not decayed."""
    warmup: Share = 0.05
    """Share of the run's steps over which the learning rate rises."""
    warmup_steps: NonNegativeInt | None = None
    """Exactly so many steps instead of `warmup`; fewer than the run has."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from a layer to the one below it (BEiT, arXiv 2106.08254); 1 for none."""
    average: Share = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and exported; 0 for none."""


class BankConfig(Frozen):
    """Stored teacher features that every step contrasts with, beside those of the batch."""

    size: NonNegativeInt = 0
    """Rows; the whole data set when it has fewer. Memory: 8 bytes for each row and unit of teacher width."""
    refresh: int = Field(default=256, ge=0, lt=2**31)
    """Rows that are replaced each step, in an order of their own, so that all rows come round."""


_WEIGHTS: Any = {name: (NonNegativeFloat, DEFAULT_WEIGHTS.get(name, 0.0)) for name in TERMS}


class LossConfig(create_model("TermWeights", __base__=Frozen, **_WEIGHTS)):  # type: ignore[misc]
    """`total = sum of weight * term`, with a weight for `task` and each of `terms.TERMS`; see docs/losses.md."""

    task: NonNegativeFloat = 1.0
    feature_kind: FeatureKind = "cosine"
    bank_rows: BankConfig = BankConfig()
    balance: Literal["none", "equal", "learned"] = "none"
    """`equal`: every teacher's part of a term is scaled to the same size; `learned`: by a learned variance of each."""
    unit_teachers: bool = True
    """Scale teacher features to norm 1. MMKD-CLIP's release takes them as stored: false."""
    cross_scale: PositiveFloat | None = None
    """Scale of cross and bank logits; learned for each teacher when not given. The release: constant 2.659."""
    equal_captions: bool = True
    """Rows of equal caption tokens, or of one image, are positives of each other. The release: negatives (false)."""
    mixed_teachers: bool = False
    """One set of keys in which each row is of the teacher drawn for it, as in the release."""

    def faults(self) -> Iterator[str]:
        if not self.task and not self.teacher_terms:
            yield "every weight is 0, so nothing would be learned; give one of them a positive value"
        if ("bank" in self.teacher_terms) != (self.bank_rows.size > 0):
            yield "`bank` and `bank_rows.size` go together: give both a positive value, or neither"
        if self.mixed_teachers and ("bank" in self.teacher_terms or self.balance != "none"):
            yield "`mixed_teachers` mixes the spaces of teachers: it goes without `bank` and `balance`"

    @property
    def teacher_terms(self) -> tuple[str, ...]:
        """The terms with weight that ask teachers."""
        return tuple(name for name in TERMS if getattr(self, name) > 0)


class PolicyConfig(Frozen):
    """Selection and weighting of a sample's available teachers in a step."""

    kind: Literal["all", "one", "weighted", "best"] = "all"
    """`one`: drawn for each sample and epoch; `weighted`: in proportion to `weights`; `best`: those highest in `by`."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Teacher to weight, for `weighted`; teachers that are not named have weight 1."""
    best: PositiveInt = 1
    """Teachers of a sample, for `best`."""
    by: Literal["caption", "corpus"] = "caption"
    """Score that `best` compares, in standard deviations of each teacher. `caption`: the cosine of image and caption.
    `corpus`: the largest cosine of the image with any caption of the run, which a wrong caption does not change."""
    keys: Literal["all", "known"] = "all"
    """Rows over which term `relational` spreads a teacher's similarities. `known`, for `by: corpus`: captions and
    images that other teachers know better lose their share, so that no teacher judges what it does not know."""
    drop: Share = 0.0
    """Chance to leave out a teacher of a sample, but never the one with the largest loss (UNIC, arXiv 2408.05088)."""

    def faults(self) -> Iterator[str]:
        if bool(self.weights) != (self.kind == "weighted"):
            yield "`weights` and `kind: weighted` go together"
        if self.by == "corpus" and self.kind != "best":
            yield f"`by: corpus` goes with `kind: best`, here `kind: {self.kind}`"
        if self.keys == "known" and self.by != "corpus":
            yield f"`keys: known` goes with `by: corpus`, here `by: {self.by}`"
        if min(self.weights.values(), default=0) < 0:
            yield "weights must not be negative"


class HeadConfig(Frozen):
    """Projection between the widths of student and teacher."""

    kind: Literal["linear", "mlp", "none"] = "linear"
    """Map from the student to each teacher; `none` compares features as they are, so widths must agree."""
    alignment: Path | None = None
    """File of `mmkd align`: a fixed map of each teacher's features, applied first."""


class DataConfig(Frozen):
    """Batch loading. What changes what a run learns: `unpaired`, `views`, `captions`, `decode`, `order`, `window` and
    `crop_scale`."""

    unpaired: bool = False
    """Train on rows with an image or a caption alone too: terms `feature` and `relational` learn from them."""

    views: bool = False
    """Train on the views that the store has (`mmkd extract --views`), one drawn for each image and epoch, and on the
    teachers' features of that view; `crop_scale` is then not used, and the original files are read."""
    captions: dict[str, NonNegativeFloat] | None = None
    """Draw weight of each kind of caption, one drawn for each row and epoch: `own`, the row's own, a kind of
    further captions that the store has, or `further` for those without a kind. When not given: all captions that the
    store has of a row alike (docs/distillation.md, table "captions")."""
    images: Literal["auto", "inputs", "corpus"] = "auto"
    """`inputs`: the store's own JPEGs (`mmkd extract --keep-inputs`); `corpus`: the original files."""
    decode: Literal["workers", "device"] = "workers"
    """`device`: the store's JPEGs are decoded and cropped on the training device (nvJPEG on CUDA); needs `inputs`."""
    features: Literal["auto", "mapped", "resident"] = "auto"
    """`mapped`: gathered from the memory map one step ahead; `resident`: kept on the device, when they fit."""
    order: Literal["shuffled", "windows"] = "shuffled"
    """`windows`: shards in random order, `window` of them at a time, and the pairs of these shuffled: for stores behind
    a URL, and for disks that are slow at random reads."""
    window: PositiveInt = 16
    """Shards of a window. More of them mix the pairs better."""
    cache: Path | None = None
    """Folder for what is fetched of a store behind a URL, best on a local disk; the run's `cache` when not given."""
    cache_gb: PositiveFloat = 50.0
    """Most that the files of `cache` may take, in GB; about four windows must fit."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the picture that a training crop keeps, as in MMKD-CLIP's training."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes of each rank that read and decode images; 0 to do it between the steps. Empty: the cores that the ranks
    of this machine may use, less one for each rank."""

    def faults(self) -> Iterator[str]:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            yield f"crop_scale: is {list(self.crop_scale)}, expected two shares of the picture, 0 < low <= high <= 1"
        if self.views and (self.images == "inputs" or self.decode == "device"):
            kept = "images: inputs" if self.images == "inputs" else "decode: device"
            yield f"views are cut from the original files, and `{kept}` reads reduced ones; leave it out"
        if self.captions is not None and not any(self.captions.values()):
            yield f"captions: every weight of {{{', '.join(self.captions)}}} is 0; give one of them more"


class ComputeConfig(Frozen):
    """Arithmetic settings. Only `precision` and `batch_norm` change more than the last bits."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the towers; `auto` is bf16 on CUDA and fp32 elsewhere. Losses are always float32."""
    micro_batch: PositiveInt | None = None
    """Rows of one forward pass of a rank; less than its share of the batch caches gradients, and the losses
    still see the whole batch (GradCache, arXiv 2101.06983)."""
    batch_norm: Literal["sync", "frozen"] = "sync"
    """`sync`: statistics of the rows of all ranks, of a micro-batch each; `frozen`: those of the first weights."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile of the towers."""
    timeout_minutes: float = Field(default=10.0, gt=0, le=525_600)
    """After which a rank that hears nothing from the others gives up; at most a year."""


class CheckpointConfig(Frozen):
    """Schedule of checkpoints and their number."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints; one more is written at the end."""
    keep_last: PositiveInt = 2
    """Most recent checkpoints kept besides the best."""
    stop_signals: tuple[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"], ...] = ("SIGTERM", "SIGUSR1")
    """On these the step is finished, a checkpoint is written, and the run ends (Slurm: `--signal=USR1@120`)."""


def _refuse_report(role: str) -> str:
    if role == "report":
        raise ValueError("a `report` set must not be seen during training; choose on sets with `role: monitor`")
    return role


class MonitorSet(Frozen):
    """Held-out rows that are looked at during training."""

    name: str = Field(pattern=r"[\w.-]+")
    where: Condition = Field(min_length=1)
    """Rows of the set."""
    store: Path | None = None
    """Another store; the run's own when not given. Its features are not used, only its rows and images."""
    role: Annotated[Literal["monitor", "report"], AfterValidator(_refuse_report)] = "monitor"
    label: str | None = None
    """Label column for zero-shot classification; without one the set is judged by retrieval."""
    prompts: Condition = ""
    """Rows whose captions are the prompts of their label."""
    limit: int = Field(default=5000, gt=1)
    """Most rows looked at: a random draw of those that match, the same each time, even over the classes of `label`."""

    def faults(self) -> Iterator[str]:
        if (self.label is None) != (not self.prompts):
            yield "`label` and `prompts` go together: give both for zero-shot, neither for retrieval"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the set's scores, the main one first."""
        return tuple(f"{self.name}/{score}" for score in (("bacc",) if self.label else ("recall@1", "recall@5")))


class MonitorConfig(Frozen):
    """Validation during the run; decides which checkpoint is the best."""

    sets: tuple[MonitorSet, ...] = ()
    every_steps: PositiveInt = 500
    metric: str = ""
    """`SET/recall@1` or `SET/bacc`, higher is better; empty for that of the first set."""
    patience: PositiveInt | None = None
    """Validations without a better one after which the run ends."""

    def faults(self) -> Iterator[str]:
        names = [entry.name for entry in self.sets]
        if len(set(names)) < len(names):
            yield f"sets: two sets have one name among {', '.join(names)}; rename one"
        metrics = [metric for entry in self.sets for metric in entry.metrics]
        if self.metric and self.metric not in metrics:
            yield f"metric {self.metric!r} does not exist: the sets give {', '.join(metrics) or 'none'}"
        if self.patience and not metrics:
            yield "patience needs monitor.sets: name held-out rows to be judged on"

    @property
    def chosen_metric(self) -> str:
        """Score that chooses the best checkpoint; empty when nothing is judged."""
        return self.metric or next((metric for entry in self.sets for metric in entry.metrics), "")


class LoggingConfig(Frozen):
    """Metric outputs besides the terminal."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases."""


class RunConfig(Frozen):
    """Everything that decides the outcome of a run."""

    preset: tuple[str, ...] = ()
    """Presets that were laid under this file, for the record; see `mmkd.distill.presets`."""
    store: Annotated[Path | str, AfterValidator(_path_or_url)]
    """Folder, or URL (`s3://`, `gs://`, `az://`, `http(s)://`), which needs `data: {order: windows}`."""
    out: Path
    """Run folder: checkpoints, TensorBoard events, the config itself."""
    student: StudentConfig
    teachers: Names = ()
    """Slugs to learn from; empty for all in the store."""
    selection: str | None = None
    """Learn from the pairs that this selection of the store keeps (`mmkd select`); empty for all sound ones."""
    where: Condition = ""
    """Rows to train on, for example "split = 'train'". Empty for all rows."""
    epochs: PositiveInt = 10
    batch_size: int = Field(default=256, gt=1)
    """Rows of one step, over all ranks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    loss: LossConfig = LossConfig()
    policy: PolicyConfig = PolicyConfig()
    heads: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    logging: LoggingConfig = LoggingConfig()

    def faults(self) -> Iterator[str]:
        """Yield what `data.order` cannot serve."""
        if self.data.order == "windows" and "bank" in self.loss.teacher_terms:
            yield "loss.bank reads rows of the whole store; it goes without `data: {order: windows}`"


def load_run(path: Path) -> RunConfig:
    """Read a run's YAML over its presets; paths are relative to the file that names them. Raises ConfigError if it is
    unreadable, or for an unknown preset or an unknown or unfit key."""
    return validated(RunConfig, compose(read_mapping(path), path), path)
