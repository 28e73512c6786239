"""The student: an open_clip model, and the geometry and tokens that it wants."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.factory import load_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import set_model_preprocess_cfg, text_global_pool
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torchvision.transforms import Compose, Normalize, PILToTensor, RandomResizedCrop, ToTensor
from transformers import AutoConfig, AutoModel

from mmkd.base.errors import ConfigError
from mmkd.distill.config import StudentConfig, TowerWeights
from mmkd.distill.presets import SCHEMES

HF_NAMES = ("hf_model_name", "hf_tokenizer_name")
"""Keys of `text_cfg` that name a folder or a repository of transformers."""

Pixels = Callable[[Image.Image], torch.Tensor]
"""A picture to uint8 (3, H, W)."""


Tokenise = Callable[[list[str]], torch.Tensor]
"""Captions to int64 (n, L)."""


def model_config(model: str) -> dict[str, Any]:
    """Return the open_clip model config of a student. Raises ConfigError if it is not a name that open_clip knows, nor
    a file or folder with an open_clip model config."""
    if not model.endswith(".json") and not model.startswith(SCHEMES):
        config = open_clip.get_model_config(model)
        if config is None:
            raise ConfigError(
                f"student model {model!r} is unknown to open_clip; name one of open_clip.list_models(), "
                "a .json model config, or an open_clip folder (local-dir:FOLDER, hf-hub:ORG/NAME)"
            )
        return dict(config)
    path = _folder(model) / "open_clip_config.json" if model.startswith(SCHEMES) else Path(model)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"student model config {path} cannot be read: {error}") from error
    content = content.get("model_cfg", content)
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(content):
        raise ConfigError(f"{path} is not an open_clip model config: expected embed_dim, vision_cfg and text_cfg")
    text = content["text_cfg"]
    if "hf_model_name" in text and (path.parent / "config.json").is_file() and model.startswith(SCHEMES):
        text |= dict.fromkeys(HF_NAMES, str(path.parent))  # not from the hub
    for name in HF_NAMES:  # folders beside the file
        if (path.parent / text.get(name, "/nowhere")).is_dir():
            text[name] = str(path.parent / text[name])
    return dict(content)


def check_text(model: str) -> Tokenise:
    """Return the tokenizer of a network, after a look at its text tower; takes a moment, unlike the network itself.
    Raises ConfigError (see `model_config`; open_clip cannot run the tower, or files of tower or tokenizer are not
    there)."""
    text = model_config(model)["text_cfg"]
    if name := text.get("hf_model_name"):
        if text.get("hf_pooler_type") == "max_pooler":
            raise ConfigError(
                f"student model {model}: open_clip's max_pooler fails on every caption; set hf_pooler_type to "
                "mean_pooler or cls_pooler"
            )
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"student model {model}: its text tower {name} cannot be read ({reason})") from error
    return student_tokenizer(model)


def save_text(student: nn.Module, tokenizer: Tokenise, folder: Path) -> None:
    """Write what transformers reads of a text tower, without a name of the machine's folders. The files of the
    tokenizer, and `config.json` of the network, where they are of transformers."""
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)
    if isinstance(text := getattr(student, "text", None), HFTextEncoder):
        text.config.save_pretrained(folder)
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in content.items() if "name_or_path" not in name}))


def _folder(model: str) -> Path:
    """Return the folder behind `local-dir:` or `hf-hub:`; the latter is downloaded."""
    scheme, _, place = model.partition(":")
    if scheme == "local-dir":
        return Path(place)
    try:
        return Path(snapshot_download(place, allow_patterns=["open_clip_*", "*.json", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{model} cannot be downloaded ({reason}); check the name and the network") from error


def build_student(config: StudentConfig, first_weights: bool = True) -> nn.Module:
    """Make the network, with its preprocessing. Raises ConfigError (see `model_config`; open_clip cannot build the
    network, or the weights are not its own). `config`: network and first weights. `first_weights`: take those that the
    configuration names; False for random ones, to be replaced by a checkpoint."""
    student = make_network(config.model)
    if first_weights and config.model.startswith(SCHEMES):
        load_released(student, config.model, config.model)
    elif first_weights and isinstance(config.pretrained, str):
        if config.pretrained:
            load_released(student, config.model, config.pretrained)
    elif first_weights and isinstance(config.pretrained, TowerWeights):
        for tower, source in config.pretrained:
            if source:
                load_tower(student, config.model, tower, source)
    wanted = {name: value for name, value in config.preprocess if value is not None}
    set_preprocessing(student, wanted)
    return student


def make_network(model: str) -> nn.Module:
    """Build an open_clip network with random weights; no tower takes weights of its own from anywhere. Raises
    ConfigError if open_clip cannot build it."""
    settings = deepcopy(model_config(model))
    text, vision = settings["text_cfg"], settings["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    custom = settings.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CoCa if custom and "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    # open_clip, timm and transformers raise any kind of error for a network that they cannot build.
    try:
        student: nn.Module = kind(**settings) if custom else open_clip.CLIP(**settings)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"student model {model} cannot be built ({reason}); choose another model") from error
    set_preprocessing(student, vars(PreprocessCfg(size=student.visual.image_size)))  # type: ignore[union-attr]
    return student


def set_preprocessing(student: nn.Module, changes: Mapping[str, Any]) -> None:
    """Change the student's preprocessing: size, mean, std, interpolation, resize_mode."""
    before = getattr(student.visual, "preprocess_cfg", {})
    set_model_preprocess_cfg(student, dict(before) | dict(changes))


def student_tokenizer(model: str) -> Tokenise:
    """Return the student's tokenizer: captions to int64 (n, L). It follows from the network, never from the name of a
    file. Raises ConfigError if its files are not there."""
    try:
        if model.startswith(SCHEMES):
            tokenizer: Tokenise = open_clip.get_tokenizer(f"local-dir:{_folder(model)}")
        elif model.endswith(".json"):
            text = model_config(model)["text_cfg"]
            context, options = text.get("context_length", 77), text.get("tokenizer_kwargs", {})
            if name := text.get("hf_tokenizer_name"):
                mode = text.get("tokenizer_mode")
                tokenizer = HFTokenizer(name, context_length=context, tokenizer_mode=mode, **options)
            else:
                tokenizer = SimpleTokenizer(context_length=context, **options)
        else:
            tokenizer = open_clip.get_tokenizer(model)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the tokenizer of student model {model} cannot be read ({reason})") from error
    return tokenizer


def load_released(student: nn.Module, model: str, source: str) -> None:
    """Load weights of both towers, with the preprocessing that belongs to them. Raises ConfigError if there are no such
    weights, or they belong to another network. `student`: whose weights are replaced. `model`: its network. `source`:
    `local-dir:` or `hf-hub:` folder, a file, or a tag of `model`."""
    tag = None
    if source.startswith(SCHEMES):
        folder = _folder(source)
        files = [*sorted(folder.glob("open_clip_*.safetensors")), *sorted(folder.glob("open_clip_*.bin")), folder]
        path = files[0]
        if path != folder:
            set_preprocessing(student, json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"])
    elif Path(source).is_file():
        path = Path(source)
    else:
        tag = open_clip.get_pretrained_cfg(model, source)
        path = folder = Path(source)
    if tag:
        try:
            path = Path(open_clip.download_pretrained(tag))
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"student.pretrained: {source} of {model} cannot be downloaded ({reason})") from error
        set_preprocessing(student, {name: tag[name] for name in _TAG_KEYS if tag.get(name) is not None})
    elif not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"student.pretrained: {source!r} is neither a file nor a tag of {model}; "
            "expected a file, an open_clip folder" + (f" or one of {', '.join(tags)}" if tags else "")
        )
    try:
        open_clip.load_checkpoint(student, str(path), strict=True)
    except (RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"student.pretrained: {path} does not fit {model} ({reason})") from error


_TAG_KEYS = ("mean", "std", "interpolation", "resize_mode")


def load_tower(student: nn.Module, model: str, tower: str, source: str) -> None:
    """Load weights of one tower; those of the image tower bring their preprocessing when they say it. Raises
    ConfigError if there are no such weights, or they belong to another network; what would fit is named.

    Args:
        student: whose tower is replaced.
        model: its network.
        tower: `image` or `text`.
        source: an open_clip tag or folder, whose tower is taken; a file or folder of a whole CLIP, of the tower, or of
            the timm or transformers network inside it, of which projections stay random.
    """
    where = f"student.pretrained.{tower}: {source}"
    place = Path(source)
    preprocess: dict[str, Any] = {}
    if source.startswith(SCHEMES) or not place.exists():
        other = make_network(source if source.startswith(SCHEMES) else model)
        load_released(other, model, source)
        weights, preprocess = other.state_dict(), other.visual.preprocess_cfg  # type: ignore[union-attr, assignment]
    else:
        weights, preprocess = _read_weights(place, where)
    if any(name.startswith("visual.") for name in weights):
        image = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
        text = {name.removeprefix("text."): value for name, value in weights.items() if not name.startswith("visual.")}
        weights = image if tower == "image" else text
    whole = student.visual if tower == "image" else getattr(student, "text", student)
    inner = getattr(whole, "trunk" if tower == "image" else "transformer", None)
    parts = [part for part in (whole, inner) if isinstance(part, nn.Module)]
    root, found = max(((part, _renamed(part, weights)) for part in parts), key=lambda pair: len(pair[1]))
    wanted = root.state_dict()
    heads = getattr(root, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    expected = {
        name
        for name, _ in root.named_parameters()
        if not (root is student and name.startswith(("visual.", "logit_"))) and not name.startswith(heads or ("\0",))
    }
    name_of = model_config(model)["vision_cfg" if tower == "image" else "text_cfg"]
    fits = name_of.get("timm_model_name") or name_of.get("hf_model_name") or f"the {tower} tower of {model}"
    other_shape = [name for name in expected & set(found) if found[name].shape != wanted[name].shape]
    missing = sorted(expected - set(found))
    if other_shape:
        first = sorted(other_shape)[0]
        shapes = [" x ".join(map(str, tensors[first].shape)) for tensors in (found, wanted)]
        raise ConfigError(f"{where}: {first} is {shapes[0]}, the student's is {shapes[1]}; expected weights of {fits}")
    if missing:
        raise ConfigError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors of the student's {tower} tower, "
            f"the first is {missing[0]}; expected weights of {fits}"
        )
    fitting = {name: value for name, value in found.items() if name in wanted and value.shape == wanted[name].shape}
    root.load_state_dict(fitting, strict=False)
    if tower == "image":
        set_preprocessing(student, {name: preprocess[name] for name in _TAG_KEYS if name in preprocess})


def _read_weights(place: Path, where: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a file, or of a timm or transformers folder, and the preprocessing that the folder's config has."""
    preprocess: dict[str, Any] = {}
    try:
        settings = json.loads((place / "config.json").read_text()) if place.is_dir() else {}
        if "model_type" in settings:
            network = AutoModel.from_pretrained(place, local_files_only=True)
            return dict(network.state_dict()), {}
        preprocess = settings.get("pretrained_cfg", settings)
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((place / name for name in names if (place / name).is_file()), place) if place.is_dir() else place
        return dict(load_state_dict(str(file), weights_only=True)), preprocess
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        raise ConfigError(f"{where} cannot be read ({' '.join(str(error).split())[:200]})") from error


def _renamed(part: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that `part` has, without the prefix under which most of them are found."""
    own = set(part.state_dict())
    prefixes = {"", *(name[: name.index(".") + 1] for name in weights if "." in name)}
    best = max(sorted(prefixes), key=lambda p: sum(n.startswith(p) and n[len(p) :] in own for n in weights))
    return {n[len(best) :]: value for n, value in weights.items() if n.startswith(best) and n[len(best) :] in own}


def preprocessing(student: nn.Module) -> PreprocessCfg:
    """Size, mean, std and interpolation of the student's images."""
    return PreprocessCfg(**student.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]


def image_side(student: nn.Module) -> int:
    """Return the longer side of the student's image, in pixels."""
    size = preprocessing(student).size
    return size if isinstance(size, int) else max(size)


def train_pixels(student: nn.Module, crop_scale: tuple[float, float]) -> Pixels:
    """Random resized crop as open_clip trains, up to the tensor; `Towers` normalizes on the device."""
    return _without_arithmetic(
        image_transform_v2(preprocessing(student), is_train=True, aug_cfg={"scale": crop_scale}).transforms
    )


def training_crop(student: nn.Module, crop_scale: tuple[float, float]) -> RandomResizedCrop:
    """Return the crop of `train_pixels` alone, with the student's size and interpolation."""
    crop = image_transform_v2(preprocessing(student), is_train=True, aug_cfg={"scale": crop_scale}).transforms[0]
    assert isinstance(crop, RandomResizedCrop)
    return crop


def plain_pixels(student: nn.Module) -> Pixels:
    """Resize and center crop as open_clip evaluates, up to the tensor."""
    return _without_arithmetic(image_transform_v2(preprocessing(student), is_train=False).transforms)


def _without_arithmetic(steps: list[Any]) -> Pixels:
    # Bytes are a quarter of the floats that ToTensor and Normalize would make of them, and are moved twice.
    *moves, to_tensor, normalise = steps
    assert isinstance(to_tensor, ToTensor)
    assert isinstance(normalise, Normalize)
    pixels: Pixels = Compose([*moves, PILToTensor()])
    return pixels


class Towers(nn.Module):
    """The student as the loop calls it: bytes and tokens in, features and temperature out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.locked: Sequence[nn.Module] = ()
        """Parts that do not learn, see `lock_layers`; their batch norms and dropout stay in evaluation."""
        visual = [part for part in student.visual.modules() if isinstance(part, nn.Conv2d)]  # type: ignore[union-attr]
        # oneDNN's gradient of a strided 1 x 1 convolution of few channels writes outside its memory in this layout
        # (torch 2.14 on AVX-512): the stems of FastViT and MobileCLIP.
        fatal = any(part.kernel_size == (1, 1) != part.stride and part.in_channels < 16 for part in visual)
        self.channels_last = len(visual) > 4 and not fatal
        """Convolutional image towers run in this layout: nearly twice as fast."""
        if self.channels_last:
            student.visual.to(memory_format=torch.channels_last)
        self.cuts_padding = False
        """True if rows of similar token length share a text batch without unneeded columns."""
        wanted = preprocessing(student)
        for name, values in (("mean", wanted.mean), ("std", wanted.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, columns: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images uint8 (B, 3, H, W), tokens int64 (B, L), columns (B,): features (B, D) twice, log scale ()."""
        return self.encode_images(images), self.encode_tokens(tokens, columns), self.log_scale * 1.0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 (B, 3, H, W) to (B, D); the arithmetic of torchvision's ToTensor and Normalize."""
        pixels = images.float().div(255).sub(self.mean).div(self.std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return self._encode_pixels(pixels.contiguous(memory_format=layout))

    def train(self, mode: bool = True) -> Towers:
        """As for any module, but locked parts stay in evaluation."""
        super().train(mode)
        for part in self.locked:
            part.eval()
        return self

    # Not compiled itself, or each division into groups would be a graph of its own; what it calls is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def encode_tokens(self, tokens: torch.Tensor, columns: Sequence[int] = ()) -> torch.Tensor:
        """Return int64 (B, L) to (B, D); with `cuts_padding`, in groups of rows that need about as many columns. The
        features are those of padded rows up to rounding, see `check_padding`."""
        if not self.cuts_padding or len(columns) != len(tokens):
            return self._encode_padded(tokens)
        groups = length_groups(columns, _GROUP_COST.get(tokens.device.type, _GROUP_COST["cuda"]))
        if len(groups) == 1:
            return self._encode_padded(tokens[:, : groups[0][0]])
        parts = [torch.tensor(rows, device=tokens.device) for _, rows in groups]
        features = [self._encode_padded(tokens[part, :length]) for (length, _), part in zip(groups, parts, strict=True)]
        return torch.cat(features)[torch.cat(parts).argsort()]

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.student.encode_image(pixels)  # type: ignore[operator]
        return features

    def _encode_padded(self, tokens: torch.Tensor) -> torch.Tensor:
        clip: Any = self.student
        text = clip if isinstance(clip, open_clip.CLIP) else clip.text
        native = isinstance(text, open_clip.CLIP | TextTransformer) and getattr(text, "cls_emb", None) is None
        # open_clip does not cut the causal mask of these, nor CLIP's positions.
        fixed = native and (text.attn_mask is not None or isinstance(text, open_clip.CLIP))
        if fixed and tokens.shape[1] < text.context_length:
            return _encode_short(text, tokens)
        features: torch.Tensor = clip.encode_text(tokens)
        return features

    def compile(self) -> None:
        """Compile both towers; shapes of text groups are dynamic."""
        self._encode_pixels = torch.compile(self._encode_pixels)  # type: ignore[method-assign]
        self._encode_padded = torch.compile(self._encode_padded)  # type: ignore[method-assign]

    @torch.no_grad()
    def check_padding(self, tokens: torch.Tensor, columns: Sequence[int]) -> None:
        """Cut padding from now on if these captions, without it, have the features of padded ones. In float64, so that
        a tower whose features depend on padding ever so little is not taken for one that rounds otherwise: SigLIP's
        pools the last column, some attend to padding. `tokens`: int64 (n, L). `columns`: (n,), less than L."""
        training = self.training
        self.eval().double()
        padded = self._encode_padded(tokens)
        cut = torch.cat([self._encode_padded(row[None, :length]) for row, length in zip(tokens, columns, strict=True)])
        self.cuts_padding = bool((padded - cut).abs().max() <= 1e-7 * padded.abs().max())
        self.float().train(training)

    @property
    def log_scale(self) -> torch.Tensor:
        """The parameter itself."""
        log_scale: torch.Tensor = self.student.logit_scale  # type: ignore[assignment]
        return log_scale


_GROUP_COST = {"cpu": 64, "cuda": 2048}
"""Tokens that a device could encode in the time that one more pass takes besides its tokens."""


def length_groups(columns: Sequence[int], cost: int) -> list[tuple[int, list[int]]]:
    """Return the division of rows by length that encodes the fewest columns: length and rows of each group. `columns`:
    that each row needs, (B,). `cost`: of one more group, in columns."""
    rows = sorted(range(len(columns)), key=lambda row: columns[row])
    ends = [n for n in range(1, len(rows) + 1) if n == len(rows) or columns[rows[n]] > columns[rows[n - 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # rows so far: least cost, where their last group begins
    for end in ends:
        best[end] = min((best[start][0] + cost + (end - start) * columns[rows[end - 1]], start) for start in best)
    groups, end = [], len(rows)
    while end:
        start = best[end][1]
        groups.append((columns[rows[end - 1]], rows[start:end]))
        end = start
    return groups[::-1]


def _encode_short(text: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`encode_text` of open_clip's own text towers for rows shorter than the context."""
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    plain = isinstance(text, open_clip.CLIP)
    kind, end = (text.text_pool_type, text.text_eos_id) if plain else (text.pool_type, text.eos_id)
    x = text_global_pool(x, tokens, kind, eos_token_id=end)
    projection = text.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    features: torch.Tensor = x
    return features
