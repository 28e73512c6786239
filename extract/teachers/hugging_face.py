"""What transformers describes in JSON: a text tower, read without asking the network, and an image processor; and its
models, built strictly and silently."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from huggingface_hub import errors as hub_errors
from pydantic import BaseModel, ValidationError, model_validator
from torch import nn

from mmkd.base.errors import TeacherError, faults_as
from mmkd.extract.teachers.source import Source, read_json, text_sources, tokenizer_folder
from mmkd.extract.teachers.spec import HF_HUB, TeacherSpec
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import StateDict, key_problems
from mmkd.store import Preprocessing

# Keys are what changes a BERT's output; the rest of config.json is history (versions, dropout, who made it).
_BERT_BASE: dict[str, object] = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip

KNOWN_TEXT_TOWERS: dict[str, dict[str, object]] = {
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": _BERT_BASE,
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext": _BERT_BASE,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": _BERT_BASE,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": _BERT_BASE,
    # A cased BERT: its vocabulary is that of bert-base-cased.
    "emilyalsentzer/Bio_ClinicalBERT": _BERT_BASE | {"vocab_size": 28996},
}
"""config.json of the text towers of the nine, so that a folder with weights and tokenizer alone is enough.
Source: each repository's config.json; the strict loading of weights would refuse a wrong width or depth."""


# huggingface_hub's own class for values that a configuration refuses; older releases raise ValueError.
_REFUSED = (ValueError, TypeError, AttributeError, getattr(hub_errors, "StrictDataclassError", ValueError))


def text_config(spec: TeacherSpec, named: str) -> dict[str, Any]:
    """Return the text tower's config.json: beside the weights, from the table above, or from the hub. Raises
    TeacherError if it is in none of these places. `named`: hub id that the teacher's own configuration gives."""
    for source in text_sources(spec, named):
        if known := KNOWN_TEXT_TOWERS.get(source.place.removeprefix(HF_HUB)):
            return dict(known)
        path = source.find("config.json")
        config = {} if path is None else read_json(path)
        # Some repositories keep a CLIPModel's config.json beside their open_clip files: not a text tower's.
        if "hidden_size" in config or "d_model" in config:
            return config
    raise spec.error(
        f"the configuration of its text tower {named or spec.text_source!r} was not found beside the weights; put its "
        f"config.json and tokenizer files in {spec.source}, or name their folder with text_source"
    )


def bert_tower(spec: TeacherSpec, hub_id: str, inert_padding: bool) -> tuple[dict[str, Any], TokenizerPlan]:
    """Return config.json and tokenizer of a BERT: `hub_id`, or what the spec's `text_source` names. Raises TeacherError
    if either is missing."""
    named = "" if spec.text_source else hub_id
    config = text_config(spec, named)
    return config, TokenizerPlan(
        context_length=spec.context_length or 77,
        folder=tokenizer_folder(spec, named),
        kind="bert",
        pad_id=forward_settings(config)["pad_token_id"],
        inert_padding=inert_padding,
    )


def forward_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a text tower's configuration that changes its output, with the class's defaults filled in.
    Raises TeacherError if transformers does not know the architecture, or it would run code of its own."""
    kind = config.get("model_type")
    fields = {name: value for name, value in config.items() if name != "model_type"}
    advice = "; write an encoder of your own"
    with faults_as(TeacherError, _REFUSED, f"text tower of type {kind!r} is not known to transformers", advice):
        whole = transformers.AutoConfig.for_model(kind, **fields)
    return {name: getattr(whole, name, None) for name in _BERT_BASE}


def make_config(spec: TeacherSpec, content: dict[str, Any]) -> Any:
    """Return a transformers configuration from the content of a config.json. Raises TeacherError for an architecture
    that transformers does not know, values it refuses, or quantized weights."""
    kind = content.get("model_type")
    if content.get("quantization_config"):
        raise spec.error(
            f"config.json of type {kind!r} is of quantized weights (quantization_config), which mmkd does not "
            "read; take the repository's float weights"
        )
    # The dtype says how the file was saved; we compute in float32 unless the spec says otherwise.
    fields = {name: value for name, value in content.items() if name not in ("model_type", "torch_dtype", "dtype")}
    with faults_as(spec.error, _REFUSED, f"config.json of type {kind!r} cannot be used"), quiet():
        return transformers.AutoConfig.for_model(kind, **fields)


def build_strictly(model_class: Any, config: Any, weights: StateDict, where: str, **arguments: Any) -> nn.Module:
    """Return `model_class` with exactly `weights`; `arguments` go to its constructor. `from_pretrained` knows the names
    and buffers of older releases (Swin's `attention.self.query`). Raises TeacherError naming every missing, unexpected
    and ill-shaped key."""
    arguments |= {"config": config, "state_dict": weights, "output_loading_info": True, "ignore_mismatched_sizes": True}
    errors = (RuntimeError, ValueError, KeyError, TypeError)
    with faults_as(TeacherError, errors, f"{where} does not fit a {model_class.__name__}"), quiet():
        model, info = model_class.from_pretrained(None, **arguments)
    shapes = [key if isinstance(key, str) else " ".join(map(str, key)) for key in info["mismatched_keys"]]
    if problems := key_problems(info["missing_keys"], info["unexpected_keys"], shapes):
        raise TeacherError(f"{where} does not fit a {model_class.__name__} of this config.json: {problems}")
    return model.float()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing its own loading report and bar; ours is the error that names the keys."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


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
