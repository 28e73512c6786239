"""CLIP's towers written down in plain torch from the authors' papers and code, to compare loaders with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def block(
    x: torch.Tensor,
    sd: State,
    at: str,
    heads: int,
    act: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """One pre-norm residual attention block of CLIP; x is (B, L, W)."""
    width = x.shape[-1]
    y = F.layer_norm(x, (width,), sd[f"{at}ln_1.weight"], sd[f"{at}ln_1.bias"])
    qkv = y @ sd[f"{at}attn.in_proj_weight"].T + sd[f"{at}attn.in_proj_bias"]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    attended = (scores if mask is None else scores + mask).softmax(-1) @ v
    x = x + attended.transpose(1, 2).flatten(2) @ sd[f"{at}attn.out_proj.weight"].T + sd[f"{at}attn.out_proj.bias"]
    y = F.layer_norm(x, (width,), sd[f"{at}ln_2.weight"], sd[f"{at}ln_2.bias"])
    y = act(y @ sd[f"{at}mlp.c_fc.weight"].T + sd[f"{at}mlp.c_fc.bias"])
    return x + y @ sd[f"{at}mlp.c_proj.weight"].T + sd[f"{at}mlp.c_proj.bias"]


def plain_vit(sd: State, image: torch.Tensor, heads: int, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """OpenAI's vision transformer over keys `visual.*`."""
    sd = {k.removeprefix("visual."): v for k, v in sd.items() if k.startswith("visual.")}
    patches = F.conv2d(image, sd["conv1.weight"], stride=sd["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    cls = sd["class_embedding"].expand(len(image), 1, -1)
    x = torch.cat([cls, patches], dim=1) + sd["positional_embedding"]
    width = (x.shape[-1],)
    x = F.layer_norm(x, width, sd["ln_pre.weight"], sd["ln_pre.bias"])
    for layer in sorted({k.split(".")[2] for k in sd if k.startswith("transformer.resblocks.")}):
        x = block(x, sd, f"transformer.resblocks.{layer}.", heads, act, None)
    return F.layer_norm(x[:, 0], width, sd["ln_post.weight"], sd["ln_post.bias"]) @ sd["proj"]


def plain_text(
    sd: State, tokens: torch.Tensor, heads: int, act: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """OpenAI's text transformer: causal, read at the highest id."""
    x = sd["token_embedding.weight"][tokens] + sd["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    for layer in sorted({k.split(".")[2] for k in sd if k.startswith("transformer.resblocks.")}):
        x = block(x, sd, f"transformer.resblocks.{layer}.", heads, act, mask)
    x = F.layer_norm(x, (x.shape[-1],), sd["ln_final.weight"], sd["ln_final.bias"])
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ sd["text_projection"]


def openai_keys(hf: State) -> State:
    """transformers' CLIPModel keys under OpenAI's names, as teachers' authors list the correspondence."""
    sd: State = {"logit_scale": hf["logit_scale"]}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layers = {k.split(".")[3] for k in hf if k.startswith(f"{tower}.encoder.layers.")}
        for n in layers:
            old, new = f"{tower}.encoder.layers.{n}.", f"{prefix}transformer.resblocks.{n}."
            for kind in ("weight", "bias"):
                sd[f"{new}attn.in_proj_{kind}"] = torch.cat([hf[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
                sd[f"{new}attn.out_proj.{kind}"] = hf[f"{old}self_attn.out_proj.{kind}"]
                for theirs, ours in (
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    sd[f"{new}{ours}.{kind}"] = hf[f"{old}{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        sd[f"visual.ln_pre.{kind}"] = hf[f"vision_model.pre_layrnorm.{kind}"]
        sd[f"visual.ln_post.{kind}"] = hf[f"vision_model.post_layernorm.{kind}"]
        sd[f"ln_final.{kind}"] = hf[f"text_model.final_layer_norm.{kind}"]
    sd["token_embedding.weight"] = hf["text_model.embeddings.token_embedding.weight"]
    sd["positional_embedding"] = hf["text_model.embeddings.position_embedding.weight"]
    sd["visual.positional_embedding"] = hf["vision_model.embeddings.position_embedding.weight"]
    sd["visual.class_embedding"] = hf["vision_model.embeddings.class_embedding"]
    sd["visual.conv1.weight"] = hf["vision_model.embeddings.patch_embedding.weight"]
    sd["visual.proj"], sd["text_projection"] = hf["visual_projection.weight"].T, hf["text_projection.weight"].T
    return sd


def plain_resnet(sd: State, image: torch.Tensor, heads: int) -> torch.Tensor:
    """CLIP's modified ResNet: three-convolution stem, average pooling before strides, attention pooling."""

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.batch_norm(x, sd[f"{at}.running_mean"], sd[f"{at}.running_var"], sd[f"{at}.weight"], sd[f"{at}.bias"])

    x = F.relu(norm(F.conv2d(image, sd["conv1.weight"], stride=2, padding=1), "bn1"))
    x = F.relu(norm(F.conv2d(x, sd["conv2.weight"], padding=1), "bn2"))
    x = F.avg_pool2d(F.relu(norm(F.conv2d(x, sd["conv3.weight"], padding=1), "bn3")), 2)
    for stage in (1, 2, 3, 4):
        at, stride = f"layer{stage}.0.", 1 if stage == 1 else 2
        y = F.relu(norm(F.conv2d(x, sd[f"{at}conv1.weight"]), f"{at}bn1"))
        y = F.relu(norm(F.conv2d(y, sd[f"{at}conv2.weight"], padding=1), f"{at}bn2"))
        y = norm(F.conv2d(F.avg_pool2d(y, stride), sd[f"{at}conv3.weight"]), f"{at}bn3")
        short = norm(F.conv2d(F.avg_pool2d(x, stride), sd[f"{at}downsample.0.weight"]), f"{at}downsample.1")
        x = F.relu(y + short)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + sd["attnpool.positional_embedding"]
    q, k, v = (
        F.linear(x, sd[f"attnpool.{n}_proj.weight"], sd[f"attnpool.{n}_proj.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for n in "qkv"
    )
    attended = (q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return F.linear(attended.transpose(1, 2).flatten(2)[:, 0], sd["attnpool.c_proj.weight"], sd["attnpool.c_proj.bias"])
