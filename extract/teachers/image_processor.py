"""The preprocessing that an image processor of transformers describes in its JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from mmkd.extract.teachers.source import Source, read_json
from mmkd.extract.teachers.spec import TeacherSpec
from mmkd.store import Preprocessing

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where transformers up to 4, and from 5 on, save what a processor does with images."""
# PIL's numbers, as preprocessor_config.json has them.
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class _Edges(BaseModel):
    shortest_edge: int | None = None
    height: int | None = None
    width: int | None = None


class _ImageProcessor(BaseModel):
    """An image processor's configuration, in any form since CLIPFeatureExtractor."""

    size: _Edges
    crop_size: _Edges | None = None
    do_center_crop: bool | None = None
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    resample: int | None = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @model_validator(mode="before")
    @classmethod
    def _edges(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Name the edges of what is one number; ViT's and DINOv3's take both sides and bilinear for granted."""
        if not isinstance(given, dict):
            return given
        kind = str(given.get("image_processor_type") or given.get("feature_extractor_type"))
        whole = kind.startswith(("ViT", "DINOv3"))
        size, crop = given.get("size", 224), given.get("crop_size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if whole else {"shortest_edge": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        return ({"resample": 2} if whole else {}) | given | {"size": size, "crop_size": crop}


def preprocessing_of(spec: TeacherSpec, source: Source) -> Preprocessing:
    """Read the preprocessing of preprocessor_config.json or processor_config.json. Raises TeacherError if it is
    missing, or asks for something that this loader would not do exactly."""
    found = [read_json(path) for name in PREPROCESSORS if (path := source.find(name)) is not None]
    # A processor_config.json of transformers 4 beside the other says nothing of images.
    contents = [one for one in found if "image_processor" in one or "image_mean" in one]
    if not contents:
        raise spec.error(f"{spec.source} has no {' or '.join(PREPROCESSORS)}{source.listing()}")
    given = contents[0].get("image_processor") or contents[0]
    try:
        asked, *again = (_ImageProcessor.model_validate(one.get("image_processor") or one) for one in contents)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "image_processor"
        reason = first["msg"].removeprefix("Value error, ")
        raise spec.error(
            f"the image processor's configuration: {name}: {reason}; download it again, or give "
            "'preprocessing' in a YAML card"
        ) from error
    if again and again[0] != asked:
        raise spec.error(f"{' and '.join(PREPROCESSORS)} of {spec.source} disagree; remove the one that is not meant")
    size, crop = asked.size, asked.crop_size or _Edges(height=224, width=224)
    cropped = asked.do_center_crop if "do_center_crop" in asked.model_fields_set else asked.crop_size is not None
    interpolation = _INTERPOLATIONS.get(asked.resample or 0)
    squashed = size.height is not None
    edges = size if squashed else crop
    height, width = edges.height or 0, edges.width or 0
    if squashed:
        fits = not cropped or (crop.height, crop.width) == (height, width)
    else:
        shortest = size.shortest_edge or 0
        fits = bool(cropped) and (shortest == min(height, width) or (height == width < shortest))
    steps = asked.do_resize and asked.do_normalize and asked.do_rescale is not False
    if not (interpolation and fits and steps and abs(asked.rescale_factor * 255 - 1) < 1e-6):
        asks = ", ".join(f"{name} {value}" for name, value in given.items() if name in _ImageProcessor.model_fields)
        raise spec.error(
            f"the image processor asks for {asks}, which mmkd does not do exactly; give 'preprocessing' in a YAML card"
        )
    return Preprocessing(
        image_size=(height, width),
        mean=asked.image_mean,
        std=asked.image_std,
        interpolation=interpolation,
        resize_mode="hf_squash" if squashed else "hf_shortest",
        resize=0 if squashed or size.shortest_edge == min(height, width) else size.shortest_edge or 0,
    )
