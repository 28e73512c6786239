"""AdamW, the learning rate as a function of the step, and the running average of the weights."""

import math
import re

import torch
from timm.models import group_parameters
from torch import nn

from mmkd.base.errors import ConfigError
from mmkd.base.text import counted
from mmkd.distill.config import LockConfig, OptimizerConfig
from mmkd.distill.student import Towers

# How open_clip, transformers and torchvision number the layers of a tower; timm says it itself.
_LAYER = re.compile(r"(?:^|\.)(?:resblocks|blocks?|layers?|stages)\.?(\d+)\.")
# What lies below the first layer.
_STEM = re.compile(
    r"conv1|bn1|conv2|bn2|conv3|bn3|patch_embed|embedding|class_emb|cls_token|pos_embed|ln_pre|norm_pre|\.stem\."
)
# Of any rank: positions, class tokens, scales of layers and of attention, temperatures.
_UNDECAYED = re.compile(
    r"pos_embed|positional_embedding|position_bias|attention_bias|cls_|class_embedding|gamma|layer_scale|ls\d|scale$"
)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make an AdamW that decays matrices only; each group's `share` is its part of the learning rate."""
    scales = learning_rate_shares(model, config)
    # Modules exempt parameters themselves (`no_weight_decay` of timm and open_clip).
    exempt = set()
    for path, part in model.named_modules():
        if callable(names := getattr(part, "no_weight_decay", None)):
            exempt |= {f"{path}.{name}" if path else name for name in names()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name in exempt or _UNDECAYED.search(name.rpartition("student.")[2])
            groups.setdefault((scales[name], 0.0 if plain else config.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay, "share": share} for (share, decay), members in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        # One pass over weights and moments instead of ten: a fifth of a small student's step on a CPU.
        fused=True,
    )


def tower_layers(model: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Map every parameter to its tower (`image`, `text` or neither) and layer: -1 for the stem, None for what lies
    behind the last layer (norm, projection, temperature). Towers of timm are numbered as timm numbers them."""
    found: dict[str, tuple[str, int | None]] = {}
    for name, _ in model.named_parameters():
        inside = f".{name}".partition(".student.")[2]
        shared = not inside or inside.startswith(("logit_", "text_decoder."))
        tower = "" if shared else "image" if inside.startswith("visual.") else "text"
        layer = _LAYER.search(name) if tower else None
        found[name] = (tower, int(layer[1]) if layer else -1 if tower and _STEM.search(name) else None)
    for path, part in model.named_modules():
        if path.endswith("visual.trunk") and hasattr(part, "group_matcher"):
            groups = group_parameters(part, part.group_matcher(coarse=False))
            found |= {f"{path}.{name}": ("image", number - 1) for number, names in groups.items() for name in names}
    return found


def learning_rate_shares(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Map every parameter to its share of the learning rate: its part's rate, and `layer_decay` to the power of its
    distance from the tower's top. What lies behind the last layer has distance 0, the stem one more than the first."""
    places = tower_layers(model)
    top: dict[str, int] = {}
    for tower, layer in places.values():
        top[tower] = max(top.get(tower, 0), layer or 0)
    rates = {"image": config.part_rates.image, "text": config.part_rates.text}
    shares = {}
    for name, (tower, layer) in places.items():
        rate = rates.get(tower, 1.0 if ".student." in f".{name}" else config.part_rates.heads)
        shares[name] = rate * config.layer_decay ** (0 if layer is None else top[tower] - layer + 1)
    return shares


def lock_layers(towers: Towers, lock: LockConfig) -> None:
    """Freeze layers of the towers. Raises ConfigError for more than a tower has, or if nothing is left to learn."""
    places = tower_layers(towers)
    parameters = dict(towers.named_parameters())
    for tower, wanted in (("image", lock.image), ("text", lock.text)):
        layers = {name: layer for name, (where, layer) in places.items() if where == tower}
        count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
        if wanted not in ("all", 0) and int(wanted) > count:
            raise ConfigError(
                f"student.lock.{tower} is {wanted}, the tower has {count} layers that can be told apart; "
                f"expected `all` or at most {count}"
            )
        for name, layer in layers.items():
            if wanted == "all" or (wanted != 0 and layer is not None and layer < int(wanted)):
                parameters[name].requires_grad_(False)
    if not any(parameters[name].requires_grad for name, (tower, _) in places.items() if tower):
        raise ConfigError("student.lock leaves nothing of the student to learn; unlock some layers of a tower")
    learned = {part: [parameter.requires_grad for parameter in part.parameters()] for part in towers.modules()}
    towers.locked = [part for part, flags in learned.items() if flags and not any(flags)]
    towers.train(towers.training)


def warmup_steps(config: OptimizerConfig, total: int) -> int:
    """Return the steps of rising learning rate. Raises ConfigError if the run of `total` would end before."""
    if config.warmup_steps is None:
        return round(config.warmup * total)
    if config.warmup_steps and config.warmup_steps >= total:
        raise ConfigError(
            f"optimizer.warmup_steps is {config.warmup_steps:,}, the run has {counted(total, 'step')} and would "
            "end before its full learning rate; give a share of the run instead, `warmup: 0.05`"
        )
    return config.warmup_steps


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Return the share of the peak learning rate at `step`: linear over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


class WeightAverage:
    """Exponential moving average of parameters and float buffers: ``a <- d * a + (1 - d) * w``. The decay d is
    `min(decay, (1 + step) / (10 + step))`, as TensorFlow's: random first weights are soon forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)
