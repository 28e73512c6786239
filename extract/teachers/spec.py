"""A teacher as it is asked for, one small picklable value, and as it is used; see the docs for the entry point. Shapes:
B batch, H and W the teacher's image size, L its context length, D its feature width."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pydantic import Field, JsonValue, field_validator

from mmkd.base.config import Frozen
from mmkd.base.errors import TeacherError
from mmkd.store import Preprocessing, TeacherCard
from mmkd.store.layout import Tower, check_slug

if TYPE_CHECKING:
    import torch

LOCAL_DIR = "local-dir:"
HF_HUB = "hf-hub:"
AUTO = "auto"

Precision = Literal["fp32", "fp16", "bf16", "auto"]
"""`auto`: the half precision that the device has (bf16, on older GPUs fp16), float32 on a CPU."""


class TeacherSpec(Frozen):
    """Recipe that turns a teacher's files into an encoder: everything `describe_teacher` and `load_teacher` need. A
    YAML card has these same fields. It travels to worker processes, so it holds no open files."""

    slug: str
    source: str
    """`local-dir:/path`, `hf-hub:org/name`, or `NAME:...` of an installed entry point in `mmkd.teachers`."""
    revision: str = ""
    """Commit of the hub repository; empty for its main branch."""
    loader: str = AUTO
    """A name in `loaders.LOADERS`, an entry point's name, or `auto`: by the files there."""
    weights: tuple[str, ...] = ()
    """File names at the source that hold the weights; empty for the names that the loader knows."""
    weights_sha256: str = ""
    """Refuse weights of another hash than this; of several files, the hash that a card shows for them together."""
    text_source: str = ""
    """Place of the text tower's configuration and tokenizer if not beside the weights."""
    context_length: int | None = Field(default=None, gt=0)
    """Tokens a caption is cut to; empty for the files' value."""
    towers: tuple[Tower, ...] = ()
    """Towers to use, `image` or `text`; empty for all that the files have."""
    preprocessing: Preprocessing | None = None
    """Empty for the files' value."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """The loader's own switches; `mmkd teachers show SLUG` prints them, a wrong one is refused by name."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; weights stay float32."""
    trust_pickle: bool = False
    """Allow files that only Python's unpickler can read. They can run any code: know their sha256."""
    license: str = "not stated"

    @field_validator("slug")
    @classmethod
    def _slug_is_a_folder_name(cls, slug: str) -> str:
        return check_slug(slug)

    def error(self, problem: str) -> TeacherError:
        return TeacherError(f"teacher {self.slug!r}: {problem}")

    @property
    def folder(self) -> Path | None:
        """The folder of a `local-dir:` source, else None."""
        return Path(self.source.removeprefix(LOCAL_DIR)).expanduser() if self.source.startswith(LOCAL_DIR) else None

    @property
    def repository(self) -> str | None:
        """The repository of an `hf-hub:` source, else None."""
        return self.source.removeprefix(HF_HUB) if self.source.startswith(HF_HUB) else None


@runtime_checkable
class Teacher(Protocol):
    """A loaded encoder in evaluation mode on one device, with the towers that its card lists: without an image tower
    `encode_images` is never called, without a text tower neither `tokenize` nor `encode_texts`. With an attribute
    `text_lengths: tuple[int, ...]`, ascending and ending in the context, `encode_texts` gets captions cut to the
    smallest of these that holds them."""

    @property
    def card(self) -> TeacherCard:
        """Identity; its digest goes into every ledger entry."""

    @property
    def device(self) -> "torch.device":
        """Device of the weights and of the input of `encode_*`."""

    def encode_images(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Encode images that have the teacher's geometry already. Returns float32 (B, D), the encoder's own output, not
        normalized unless the card says so. `pixels`: uint8 (B, C, H, W) on `device`: resized, cropped and in the card's
        color mode (C is 3 for RGB, 1 for L). Scaling to 0..1, mean and std are applied by the teacher."""

    def tokenize(self, captions: list[str]) -> tuple["torch.Tensor", list[int]]:
        """Turn captions into token ids. Returns int64 (B, L) padded to the context length, and for every caption the
        number of tokens that it has before it is cut to the context (special tokens included)."""

    def encode_texts(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Encode token ids int64 (B, L) on `device`; returns float32 (B, D) as `encode_images` does."""
