"""The teacher card: the origin of features, exact enough to refuse mixing them with others."""

from functools import cached_property
from typing import Annotated

from pydantic import AfterValidator, Field, computed_field, model_validator

from mmkd.base.errors import CorruptStoreError, UserError, faults_as
from mmkd.base.files import list_folder
from mmkd.base.places.remote import StorePath
from mmkd.store.encoding import VALID, ArraySpec, CosineError, tower_arrays
from mmkd.store.hierarchy import Document, canonical_sha256, is_there, parse_document, read_json, sealed_content
from mmkd.store.layout import MAX_DIM, SOUND_BIT, TOWERS, Encoding, Tower, check_slug, is_slug, teacher_group


class Preprocessing(Document):
    """Image preprocessing: the fields of open_clip's `preprocess_cfg` plus the color mode."""

    image_size: tuple[int, int]
    """Height and width in pixels; (0, 0) if not stated (imported features)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """`shortest` (shorter side to size, center crop), `longest` (pad) or `squash` as open_clip names them;
    `hf_shortest`, `hf_squash` with transformers' rounding; `pad_square` as MedCLIP does."""
    fill: int = 0
    """Gray level of padding, 0 to 255."""
    resize: int = Field(default=0, ge=0)
    """Pixels of the shorter side before the center crop, in modes that crop; 0 for that of `image_size`."""
    color: str = "RGB"
    """PIL mode in which the image is resized last: `RGB`, or `L` for a teacher that sees one channel thrice."""


def _check_towers(towers: tuple[Tower, ...]) -> tuple[Tower, ...]:
    """Return a non-empty part of `TOWERS`, in its order."""
    if not towers or towers != tuple(tower for tower in TOWERS if tower in towers):
        raise ValueError(f"towers are {list(towers)}, expected image, text, or both in this order")
    return towers


class TeacherCard(Document):
    """A teacher's card. Two cards with equal `digest` give equal features: it covers weights, preprocessing, tokenizer
    and widths, and leaves out what cannot change a feature (place, license, library versions)."""

    slug: Annotated[str, AfterValidator(check_slug)]
    source: str
    """Source of the weights as a user would type it: `local-dir:...`, `hf-hub:...`."""
    revision: str = ""
    weights_sha256: str
    towers: Annotated[tuple[Tower, ...], AfterValidator(_check_towers)] = TOWERS
    """Towers that the teacher has; only their features are stored."""
    preprocessing: Preprocessing | None = None
    """None without an image tower."""
    tokenizer_sha256: str = ""
    """Empty without a text tower."""
    context_length: int = Field(default=0, ge=0)
    """Tokens a caption is cut to; 0 if not stated (imported features), and without a text tower."""
    dim: int = Field(gt=0, le=MAX_DIM)
    """Width D of a feature, as stored; both towers of one teacher share a space."""
    encoding: Encoding = "float16"
    loader: str = "open_clip"
    """Code path that turns the files into features (pooling, masks and activations are its business)."""
    normalized: bool = False
    """True when stored features have unit norm; false when they are the encoder's own output."""
    logit_scale: float | None = None
    """exp of the learned temperature: cosine times this are the teacher's logits."""
    license: str = "not stated"
    versions: dict[str, str] = Field(default_factory=dict)
    """Libraries that ran the teacher, name to version."""
    encoding_error: dict[Tower, CosineError] | None = None
    """Measured on the rows of this store when all of them were there; None for floats and until then."""

    def with_encoding(self, encoding: Encoding) -> "TeacherCard":
        """Return the card of the same teacher whose features lie in another encoding: another digest."""
        if encoding == self.encoding:
            return self
        # Not model_copy: it would take the digest along, which is computed once.
        content = self.model_dump(exclude={"digest", "encoding", "encoding_error"})
        return TeacherCard.model_validate(content | {"encoding": encoding})

    @model_validator(mode="after")
    def _preprocessing_is_of_images(self) -> "TeacherCard":
        if (self.preprocessing is not None) != ("image" in self.towers):
            raise ValueError("preprocessing is stated exactly for a teacher with an image tower")
        return self

    def tower_arrays(self, tower: Tower) -> tuple[ArraySpec, ...]:
        """Return the values, and for int8 their scales. Raises UserError if the teacher has no such tower."""
        if tower not in self.towers:
            raise UserError(
                f"teacher {self.slug} has no {tower} tower (its card lists {self.towers[0]} only); "
                f"name teachers with {'an' if tower == 'image' else 'a'} {tower} tower"
            )
        return tower_arrays(tower, self.encoding, self.dim)

    @property
    def image_preprocessing(self) -> Preprocessing:
        """Return the preprocessing. Raises UserError if the teacher has no image tower."""
        self.tower_arrays("image")
        assert self.preprocessing is not None
        return self.preprocessing

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Return all arrays in the order in which they are written."""
        return (*(spec for tower in self.towers for spec in self.tower_arrays(tower)), VALID)

    @property
    def sound_bits(self) -> dict[Tower, int]:
        """Return the bit of `valid` of each tower."""
        return {tower: SOUND_BIT[tower] for tower in self.towers}

    @property
    def all_sound(self) -> int:
        """Return the value of `valid` where every tower of the teacher is sound."""
        return sum(self.sound_bits.values())

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over everything that can change a feature."""
        names = {"weights_sha256", "preprocessing", "tokenizer_sha256", "context_length", "towers", "dim", "encoding"}
        return canonical_sha256(self.model_dump(include={*names, "loader", "normalized"}))[:16]


def read_card(root: StorePath, slug: str) -> TeacherCard | None:
    """Read the card of the teacher in folder `slug`; None when there is none (a teacher not created to the end). Raises
    CorruptStoreError if the card was changed, does not make sense, or belongs to another folder."""
    path = root / teacher_group(slug) / "zarr.json"
    if not is_there(path):
        return None
    document = read_json(path)
    if document.get("attributes") == {}:
        return None
    content = sealed_content(path, document)
    digest = content.pop("digest", None)
    with faults_as(CorruptStoreError, UserError, f"{path} is damaged"):  # of a slug that cannot be a folder
        card = parse_document(TeacherCard, content, path)
    if card.slug != slug:
        raise CorruptStoreError(f"{path} is the card of {card.slug!r}, expected {slug!r}; put the right file back")
    if card.digest != digest:
        raise CorruptStoreError(f"{path} has digest {digest!r}, its fields give {card.digest}; put the right file back")
    return card


def teacher_folders(root: StorePath) -> list[str]:
    """Return names below `teachers/` that may be teachers, in order; what cannot be a slug is not one."""
    folders = list_folder(root / "teachers")
    return [path.name for path in folders if is_slug(path.name) and is_there(path / "zarr.json")]


def read_cards(root: StorePath) -> dict[str, TeacherCard]:
    """Read every teacher's card, by slug in order. Raises CorruptStoreError as `read_card`."""
    cards = {slug: read_card(root, slug) for slug in teacher_folders(root)}
    return {slug: card for slug, card in cards.items() if card is not None}
