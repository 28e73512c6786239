"""The student: an open_clip model with its first weights, and the images and tokens that it wants."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
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
from safetensors import SafetensorError
from torch import nn
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor
from transformers import AutoConfig, AutoModel

from mmkd.base.errors import ConfigError, faults_as
from mmkd.distill.captions import Tokenize
from mmkd.distill.config import StudentConfig, TowerWeights
from mmkd.distill.presets import SCHEMES

HF_NAMES = ("hf_model_name", "hf_tokenizer_name")
"""Keys of `text_cfg` that name a folder or a repository of transformers."""
_TAG_KEYS = ("mean", "std", "interpolation", "resize_mode")
# What open_clip, timm, transformers and the readers of weights raise for a network or file that they cannot use.
_ERRORS: tuple[type[Exception], ...]
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)
_ERRORS += (UnpicklingError, SafetensorError)


_one_line = partial(faults_as, ConfigError, _ERRORS)


def model_config(model: str) -> dict[str, Any]:
    """Return the open_clip model config of a student; local folders in it are absolute. Raises ConfigError if `model`
    is not a name that open_clip knows, nor a file or folder with an open_clip model config."""
    if not model.endswith(".json") and not model.startswith(SCHEMES):
        config = open_clip.get_model_config(model)
        if config is None:
            raise ConfigError(
                f"student model {model!r} is unknown to open_clip; name one of open_clip.list_models(), "
                "a .json model config, or an open_clip folder (local-dir:FOLDER, hf-hub:ORG/NAME)"
            )
        return dict(config)
    path = (_folder(model) / "open_clip_config.json" if model.startswith(SCHEMES) else Path(model)).absolute()
    with _one_line(f"student model config {path} cannot be read"):
        content = json.loads(path.read_text())
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


def check_text(model: str) -> Tokenize:
    """Return the tokenizer of a network after a quick look at its text tower. Raises ConfigError as `model_config`, or
    if open_clip cannot run the tower, or files of tower or tokenizer are missing."""
    text = model_config(model)["text_cfg"]
    if name := text.get("hf_model_name"):
        if text.get("hf_pooler_type") == "max_pooler":
            raise ConfigError(
                f"student model {model}: open_clip's max_pooler fails on every caption; set hf_pooler_type to "
                "mean_pooler or cls_pooler"
            )
        with _one_line(f"student model {model}: its text tower {name} cannot be read"):
            AutoConfig.from_pretrained(name)
    return student_tokenizer(model)


def student_tokenizer(model: str) -> Tokenize:
    """Return the tokenizer; no name of a file decides which. Raises ConfigError if its files are missing."""
    with _one_line(f"the tokenizer of student model {model} cannot be read"):
        if not model.endswith(".json"):
            name = f"local-dir:{_folder(model)}" if model.startswith(SCHEMES) else model
            return open_clip.get_tokenizer(name)
        text = model_config(model)["text_cfg"]
        options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
        if name := text.get("hf_tokenizer_name"):
            tokenizer = HFTokenizer(name, tokenizer_mode=text.get("tokenizer_mode"), **options)
        else:
            tokenizer = SimpleTokenizer(**options)
    return tokenizer


def save_text(student: nn.Module, tokenizer: Tokenize, folder: Path) -> None:
    """Write what transformers reads of tokenizer and text tower, where they are its own: the tokenizer's files, and the
    network's `config.json`; no name of a local folder."""
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
    with _one_line(f"{model} cannot be downloaded", "; check the name and the network"):
        return Path(snapshot_download(place, allow_patterns=["open_clip_*", "*.json", "*.txt", "*.model"]))


def build_student(config: StudentConfig, first_weights: bool = True) -> nn.Module:
    """Build the network with its preprocessing and the weights that the configuration names, or random ones. Raises
    ConfigError if open_clip cannot build it, or the weights are not its own."""
    student = make_network(config.model)
    source = config.model if config.model.startswith(SCHEMES) else config.pretrained
    if first_weights and isinstance(source, TowerWeights):
        for tower, one in source:
            if one:
                _load_tower(student, config.model, tower, one)
    elif first_weights and isinstance(source, str) and source:
        _load_released(student, config.model, source)
    set_preprocessing(student, config.preprocess.model_dump(exclude_none=True))
    return student


def make_network(model: str) -> nn.Module:
    """Build an open_clip network with random weights alone. Raises ConfigError if open_clip cannot build it."""
    settings = deepcopy(model_config(model))
    text, vision = settings["text_cfg"], settings["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    custom = settings.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CoCa if custom and "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    with _one_line(f"student model {model} cannot be built", "; choose another model"):
        student: nn.Module = kind(**settings) if custom else open_clip.CLIP(**settings)
    set_preprocessing(student, vars(PreprocessCfg(size=student.visual.image_size)))  # type: ignore[union-attr]
    return student


def _load_released(student: nn.Module, model: str, source: str) -> None:
    """Load weights of both towers and their preprocessing from a `local-dir:` or `hf-hub:` folder, a file, or a tag of
    `model`. Raises ConfigError if there are none, or they belong to another network."""
    path, tag = Path(source), None
    if source.startswith(SCHEMES):
        folder = _folder(source)
        files = [path for kind in ("safetensors", "bin") for path in sorted(folder.glob(f"open_clip_*.{kind}"))]
        path = files[0] if files else folder
        if files:
            set_preprocessing(student, json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"])
    elif not path.is_file():
        tag = open_clip.get_pretrained_cfg(model, source)
    if tag:
        with _one_line(f"student.pretrained: {source} of {model} cannot be downloaded"):
            path = Path(open_clip.download_pretrained(tag))
        set_preprocessing(student, {name: tag[name] for name in _TAG_KEYS if tag.get(name) is not None})
    elif not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"student.pretrained: {source!r} is neither a file nor a tag of {model}; "
            "expected a file, an open_clip folder" + (f" or one of {', '.join(tags)}" if tags else "")
        )
    with _one_line(f"student.pretrained: {path} does not fit {model}"):
        open_clip.load_checkpoint(student, str(path), strict=True)


def _load_tower(student: nn.Module, model: str, tower: str, source: str) -> None:
    """Load weights of the `image` or `text` tower; those of the image tower bring their preprocessing when they say it.
    `source`: an open_clip tag or folder, whose tower is taken; a file or folder of a whole CLIP, of the tower, or of
    the timm or transformers network inside it, of which projections stay random. Raises ConfigError if there are no
    such weights, or they belong to another network; what would fit is named."""
    where = f"student.pretrained.{tower}: {source}"
    if source.startswith(SCHEMES) or not Path(source).exists():
        other = make_network(source if source.startswith(SCHEMES) else model)
        _load_released(other, model, source)
        weights: Mapping[str, torch.Tensor] = other.state_dict()
        preprocess: Any = other.visual.preprocess_cfg  # type: ignore[union-attr]
    else:
        weights, preprocess = _read_weights(Path(source), where)
    if any(name.startswith("visual.") for name in weights):
        image = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
        text = {name.removeprefix("text."): value for name, value in weights.items() if not name.startswith("visual.")}
        weights = image if tower == "image" else text
    whole = student.visual if tower == "image" else getattr(student, "text", student)
    inner = getattr(whole, "trunk" if tower == "image" else "transformer", None)
    parts = [part for part in (whole, inner) if isinstance(part, nn.Module)]
    root, found = max(((part, _rename(part, weights)) for part in parts), key=lambda pair: len(pair[1]))
    wanted = root.state_dict()
    heads = getattr(root, "pretrained_cfg", {}).get("classifier") or ()
    others = ("visual.", "logit_") if root is student else (heads,) if isinstance(heads, str) else tuple(heads)
    expected = {name for name, _ in root.named_parameters() if not name.startswith(others)}
    settings = model_config(model)["vision_cfg" if tower == "image" else "text_cfg"]
    fits = settings.get("timm_model_name") or settings.get("hf_model_name") or f"the {tower} tower of {model}"
    other_shape = sorted(name for name in expected & set(found) if found[name].shape != wanted[name].shape)
    if other_shape:
        first = other_shape[0]
        shapes = [" x ".join(map(str, tensors[first].shape)) for tensors in (found, wanted)]
        raise ConfigError(f"{where}: {first} is {shapes[0]}, the student's is {shapes[1]}; expected weights of {fits}")
    if missing := sorted(expected - set(found)):
        raise ConfigError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors of the student's {tower} tower, "
            f"the first is {missing[0]}; expected weights of {fits}"
        )
    fitting = {name: value for name, value in found.items() if name in wanted and value.shape == wanted[name].shape}
    root.load_state_dict(fitting, strict=False)
    if tower == "image":
        set_preprocessing(student, {name: preprocess[name] for name in _TAG_KEYS if name in preprocess})


def _read_weights(place: Path, where: str) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Read a file, or a timm or transformers folder: tensors, and the preprocessing that the folder's config has."""
    with _one_line(f"{where} cannot be read"):
        if not place.is_dir():
            return dict(load_state_dict(str(place), weights_only=True)), {}
        settings = json.loads((place / "config.json").read_text())
        if "model_type" in settings:
            return AutoModel.from_pretrained(place, local_files_only=True).state_dict(), {}
        file = place / "model.safetensors"
        file = file if file.is_file() else place / "pytorch_model.bin"
        return dict(load_state_dict(str(file), weights_only=True)), settings.get("pretrained_cfg", settings)


def _rename(part: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that `part` has, without the prefix under which most of them are found."""
    own = set(part.state_dict())
    prefixes = {"", *(name[: name.index(".") + 1] for name in weights if "." in name)}
    best = max(sorted(prefixes), key=lambda p: sum(n.startswith(p) and n[len(p) :] in own for n in weights))
    return {n[len(best) :]: value for n, value in weights.items() if n.startswith(best) and n[len(best) :] in own}


def set_preprocessing(student: nn.Module, changes: Mapping[str, Any]) -> None:
    """Change the student's preprocessing: size, mean, std, interpolation, resize_mode."""
    before = getattr(student.visual, "preprocess_cfg", {})
    set_model_preprocess_cfg(student, dict(before) | dict(changes))


def preprocessing(student: nn.Module) -> PreprocessCfg:
    """Return size, mean, std and interpolation of the student's images."""
    return PreprocessCfg(**student.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]


def image_size(student: nn.Module) -> tuple[int, int]:
    """Return height and width of the student's images, in pixels."""
    size = preprocessing(student).size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def student_pixels(student: nn.Module, crop_scale: tuple[float, float] | None = None) -> Compose:
    """Return the transform of a picture to uint8 (3, H, W): open_clip's of evaluation, or with a `crop_scale` that of
    training, which begins with a random resized crop. `Towers` normalizes on the device."""
    scale = {} if crop_scale is None else {"scale": crop_scale}
    transform = image_transform_v2(preprocessing(student), is_train=bool(scale), aug_cfg=scale)
    # Bytes are a quarter of the floats that ToTensor and Normalize would make of them, and are moved twice.
    *moves, to_tensor, normalize = transform.transforms
    assert isinstance(to_tensor, ToTensor)
    assert isinstance(normalize, Normalize)
    return Compose([*moves, PILToTensor()])


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
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing(student), name))
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, columns: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode images uint8 (B, 3, H, W) and tokens int64 (B, L): features (B, D) of both, and the log scale ()."""
        return self.encode_images(images), self.encode_tokens(tokens, columns), self.log_scale * 1.0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode uint8 (B, 3, H, W) to (B, D), after the arithmetic of torchvision's ToTensor and Normalize."""
        if not len(images):  # as one blank image, left out: many networks fail on none, and ranks wait for gradients
            return self.encode_images(images.new_zeros(1, 3, *image_size(self.student)))[:0]
        pixels = images.float().div(255).sub(self.mean).div(self.std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return self._encode_pixels(pixels.contiguous(memory_format=layout))

    def train(self, mode: bool = True) -> "Towers":
        """Set the mode of all parts but the locked ones, which stay in evaluation."""
        super().train(mode)
        for part in self.locked:
            part.eval()
        return self

    # Not compiled itself, or each division into groups would be a graph of its own; what it calls is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def encode_tokens(self, tokens: torch.Tensor, columns: Sequence[int] = ()) -> torch.Tensor:
        """Encode int64 (B, L) to (B, D); with `cuts_padding` and the columns that each row needs (B,), in groups of
        rows of like length. The features are those of padded rows up to rounding, see `check_padding`."""
        if not len(tokens):
            return self.encode_tokens(tokens.new_ones(1, tokens.shape[1]))[:0]
        if not self.cuts_padding or len(columns) != len(tokens):
            return self._encode_padded(tokens)
        groups = length_groups(columns, _GROUP_COST.get(tokens.device.type, _GROUP_COST["cuda"]))
        if len(groups) == 1:
            return self._encode_padded(tokens[:, : groups[0][0]])
        parts = [torch.tensor(rows, device=tokens.device) for _, rows in groups]
        features = [self._encode_padded(tokens[part, :length]) for (length, _), part in zip(groups, parts, strict=True)]
        return torch.cat(features)[torch.cat(parts).argsort()]

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.student.encode_image(pixels)  # type: ignore[operator]

    def _encode_padded(self, tokens: torch.Tensor) -> torch.Tensor:
        clip: Any = self.student
        text = clip if isinstance(clip, open_clip.CLIP) else clip.text
        native = isinstance(text, open_clip.CLIP | TextTransformer) and getattr(text, "cls_emb", None) is None
        # open_clip does not cut the causal mask of these, nor CLIP's positions.
        fixed = native and (text.attn_mask is not None or isinstance(text, open_clip.CLIP))
        if fixed and tokens.shape[1] < text.context_length:
            return _encode_short(text, tokens)
        return clip.encode_text(tokens)

    def compile(self) -> None:
        """Compile both towers; shapes of text groups are dynamic."""
        self._encode_pixels = torch.compile(self._encode_pixels)  # type: ignore[method-assign]
        self._encode_padded = torch.compile(self._encode_padded)  # type: ignore[method-assign]

    @torch.no_grad()
    def check_padding(self, tokens: torch.Tensor, columns: Sequence[int]) -> None:
        """Cut padding from now on if these captions, int64 (n, L), have the same features without it, cut to `columns`
        (n,). In float64, so that a tower whose features depend on padding ever so little is not taken for one that
        rounds otherwise: SigLIP's pools the last column, some attend to padding."""
        training = self.training
        self.eval().double()
        padded = self._encode_padded(tokens)
        cut = torch.cat([self._encode_padded(row[None, :length]) for row, length in zip(tokens, columns, strict=True)])
        self.cuts_padding = bool((padded - cut).abs().max() <= 1e-7 * padded.abs().max())
        self.float().train(training)

    @property
    def log_scale(self) -> torch.Tensor:
        return self.student.logit_scale  # type: ignore[return-value]


_GROUP_COST = {"cpu": 64, "cuda": 2048}
"""Tokens that a device could encode in the time that one more pass takes besides its tokens."""


def length_groups(columns: Sequence[int], cost: int) -> list[tuple[int, list[int]]]:
    """Group rows by the columns that each needs, (B,), so that the fewest are encoded when one more group costs as much
    as `cost` columns. Returns length and rows of each group."""
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
    return x
