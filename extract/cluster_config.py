"""A cluster in YAML: Dask's own sections and keywords, so that files that people have already can be pasted in."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, JsonValue, PositiveFloat, PositiveInt

from mmkd.base.config import Frozen, read_mapping, validated
from mmkd.base.errors import ConfigError, did_you_mean
from mmkd.base.install import import_extra

DASK_PLACES = "the YAML files in $DASK_CONFIG or ~/.config/dask, or the variables DASK_..."

try:
    import dask
    from distributed import Security
except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as _error:
    # Importing Dask reads ~/.config/dask; its own messages fill a screen.
    _reason = " ".join(f"{type(_error).__name__}: {_error}".split())[:300]
    raise ConfigError(f"Dask cannot read its configuration: {_reason}; correct {DASK_PLACES}") from None

BATCH_SYSTEMS = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster"}
"""Names of `--scheduler` and its dask-jobqueue class."""

LOCAL = "local"


class TlsFiles(Frozen):
    """The three files of `dask scheduler --tls-ca-file --tls-cert --tls-key`; one certificate serves every role."""

    tls_ca_file: Path
    tls_cert: Path
    tls_key: Path


class WorkerConfig(Frozen):
    """Worker process settings. On a CPU only `channels_last` and `compile` can change last bits."""

    decode_threads: PositiveInt | None = None
    """Threads that decode images in each worker, for all its shards in hand. Empty: the cores that a worker may use,
    divided by the workers that share them."""
    read_threads: PositiveInt | None = None
    """Threads that read encoded images, ahead of the decoders. Empty: two for each that decodes, 4 to 32."""
    batch_rows: PositiveInt | None = None
    """Rows handed to a teacher at once; halved permanently in a worker whose device runs out of memory. Empty: 32 on a
    CPU; on a GPU what a short search finds, see `mmkd.extract.forward`."""
    shards_at_once: PositiveInt | None = None
    """Shards in hand in each local worker process; one writes and tokenizes while the other has the device.
    Empty: 1 on a CPU, 2 on a GPU. On a cluster the threads of its workers decide."""
    autocast: bool = False
    """Compute in the half precision of the device: bf16, on older GPUs fp16; float32 on a CPU. A part of the teacher's
    digest, so that a store never mixes it with float32. A card's own `fp16` or `bf16` stands."""
    channels_last: bool = True
    """Order of the convolutions' weights."""
    compile: bool = False
    """Run both towers through `torch.compile`: minutes at the start of each worker, for a gain that depends on the
    device; measure it first."""
    hang_seconds: PositiveFloat = 600
    """Watchdog timeout: a worker without progress for this long exits, and its shard moves to another."""


class ClusterConfig(Frozen):
    """Cluster settings. The content of the YAML file that `--scheduler FILE.yaml` names."""

    scheduler: str = LOCAL
    """`local`, `slurm`, `pbs`, `sge`, or the address of a scheduler that runs already."""
    workers: PositiveInt | None = None
    """Worker processes. Empty: one per GPU or core of this machine; one job of a batch system."""
    jobqueue: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """dask-jobqueue's own keywords under the name of the batch system, as in `~/.config/dask/jobqueue.yaml`."""
    distributed: dict[str, JsonValue] = Field(default_factory=dict)
    """Dask's own settings, as in `~/.config/dask/distributed.yaml`; in force for this run."""
    security: TlsFiles | None = None
    worker: WorkerConfig = WorkerConfig()

    def faults(self) -> Iterator[str]:
        if self.scheduler != LOCAL and self.scheduler not in BATCH_SYSTEMS and "://" not in self.scheduler:
            hint = did_you_mean(self.scheduler, (LOCAL, *BATCH_SYSTEMS), "an address looks like tcp://HOST:8786")
            yield f"scheduler: {self.scheduler!r} is not local, slurm, pbs, sge, an address or a YAML file; {hint}"
        for path, _ in leaves(self.distributed):
            node: Any = dask.config.get("distributed")
            for depth, step in enumerate(path):
                if not isinstance(node, Mapping) or not node:
                    break  # below a setting whose value is free
                if (found := next((known for known in node if _canonical(known) == _canonical(step)), None)) is None:
                    here = ".".join(path[: depth + 1])
                    yield f"distributed: Dask has no setting distributed.{here}; {_suggestion(step, node)}"
                    break
                node = node[found]

    def dask_security(self) -> Security | None:
        """Return Dask's object for `security`, which refuses unencrypted connections; None without `security`."""
        if self.security is None:
            return None
        files = {
            f"tls_{role}_{part}": str(file)
            for role in ("client", "scheduler", "worker")
            for part, file in (("cert", self.security.tls_cert), ("key", self.security.tls_key))
        }
        return Security(tls_ca_file=str(self.security.tls_ca_file), require_encryption=True, **files)

    def batch_keywords(self) -> dict[str, Any]:
        """Return the keywords of this run's batch system, spelled as Python arguments."""
        return {_canonical(name): value for name, value in self.jobqueue.get(self.scheduler, {}).items()}


def load_cluster(scheduler: str, workers: int | None = None) -> ClusterConfig:
    """Read the value of `--scheduler`; `--workers` overrides the file. Raises ConfigError for an unknown name, an
    unknown or wrong key, or missing TLS files."""
    path = Path(scheduler)
    is_file = path.suffix in (".yaml", ".yml")
    where = path if is_file else Path("--scheduler")
    content: dict[str, Any] = read_mapping(path) if is_file else {"scheduler": scheduler}
    if isinstance(content.get("security"), dict):
        content["security"] = {_canonical(name): value for name, value in content["security"].items()}
    if workers is not None:
        content["workers"] = workers
    cluster = validated(ClusterConfig, content, where)
    for name in cluster.jobqueue:
        if name not in BATCH_SYSTEMS:
            raise ConfigError(f"{where}: jobqueue.{name}: {_suggestion(name, BATCH_SYSTEMS)}")
    known = keywords_of(cluster.scheduler) if cluster.scheduler in BATCH_SYSTEMS else set()
    for name in cluster.batch_keywords():
        if name not in known:
            raise ConfigError(f"{where}: jobqueue.{cluster.scheduler}.{name}: {_suggestion(name, known)}")
    if cluster.security is not None:
        files = {name: path.parent / file for name, file in cluster.security}
        for name, file in files.items():
            if not file.is_file():
                raise ConfigError(f"{where}: security.{name}: {file} does not exist; name a PEM file")
        cluster = cluster.model_copy(update={"security": TlsFiles(**files)})
    return cluster


def keywords_of(batch_system: str) -> set[str]:
    """Return the keywords that the installed dask-jobqueue takes for `slurm`, `pbs` or `sge`. Raises UserError if
    dask-jobqueue is not installed."""
    cluster_class = cluster_class_of(batch_system)
    kinds = [*cluster_class.__mro__, *cluster_class.job_cls.__mro__]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {
        parameter.name
        for kind in kinds
        if kind.__module__.startswith("dask_jobqueue")
        for parameter in inspect.signature(kind.__init__).parameters.values()
        if parameter.kind in named
    }
    return names - {"self", "scheduler", "loop", "asynchronous", "job_cls", "n_workers", "security", "config_name"}


def cluster_class_of(batch_system: str) -> Any:
    """dask-jobqueue's class. Raises UserError if dask-jobqueue is not installed."""
    jobqueue = import_extra("dask_jobqueue", "cluster", f"--scheduler {batch_system}")
    return getattr(jobqueue, BATCH_SYSTEMS[batch_system])


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of every setting of a nested mapping."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value


def own_settings() -> Iterator[object]:
    """Yield `distributed` of each YAML file of the user's, and of the variables DASK_..., before Dask merges them."""
    for part in (*dask.config.collect_yaml(dask.config.paths), dask.config.collect_env()):
        if part.get("distributed") is not None:
            yield part["distributed"]


def values_for_sections(
    settings: object, defaults: Mapping[str, Any] | None = None, above: str = "distributed"
) -> Iterator[str]:
    """Yield what is one value in `distributed` settings where Dask's `defaults` have a section of several: its own code
    fails on them far from the cause."""
    defaults = dask.config.merge(*dask.config.defaults)["distributed"] if defaults is None else defaults
    if not isinstance(settings, Mapping):
        yield f"{above}: {settings!r}"
        return
    for name, default in defaults.items():
        value = settings.get(dask.config.canonical_name(name, dict(settings)))
        if isinstance(default, Mapping) and default and value is not None:
            yield from values_for_sections(value, default, f"{above}.{name}")


def _canonical(name: object) -> str:
    return str(name).replace("-", "_")


def _suggestion(name: str, known: Iterable[str]) -> str:
    names = sorted(map(str, known))
    dashed = did_you_mean(name.replace("_", "-"), names, f"known keys: {', '.join(names)}")
    return f"unknown key; {did_you_mean(name, names, dashed)}"
