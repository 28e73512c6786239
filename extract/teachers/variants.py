"""Other published forms of the nine, each a card of its own: the same loaders, other files or switches."""

from __future__ import annotations

from mmkd.extract.teachers.nine import NOT_STATED, THE_NINE, PublishedTeacher, forked_open_clip

_NINE = {teacher.slug: teacher for teacher in THE_NINE}


def _variant(of: str, slug: str, name: str, **changes: object) -> PublishedTeacher:
    """The card of `of` with `changes`; spellings, pins and doubts of the original do not carry over."""
    fresh = {"also_called": (), "revision": "", "weights_sha256": "", "open_questions": (), "inferred": False}
    return PublishedTeacher.model_validate(_NINE[of].model_dump() | fresh | {"slug": slug, "name": name} | changes)


VARIANTS: tuple[PublishedTeacher, ...] = (
    _variant(
        "unimedclip",
        "mmkd-b16",
        "MMKD-CLIP ViT-B/16",
        files=("MMKD_B16.pth",),
        also_called=("MMKD_B16", "mmkdclip"),
        # The student of the original: the same fork, the same keys.
        source="https://drive.google.com/file/d/16pDQ2rI3VKezUl_WVxm1gVmhljQWxjJR",
        weights=("MMKD_B16.pth",),
        licence="MIT",
        paper="MMKD-CLIP",
    ),
    _variant(
        "unimedclip",
        "unimedclip-l14",
        "UniMed-CLIP ViT-L/14",
        files=("unimed_clip_vit_l14_base_text_encoder.pt",),
        source="hf-hub:UzairK/unimed_clip_vit_l14_base_text_encoder",
        weights=("unimed_clip_vit_l14_base_text_encoder.pt",),
        options=forked_open_clip("ViT-L-14-336-quickgelu"),
        image_tower="ViT-L/14, 336 px, QuickGELU",
        pixels="RGB, 336 px, shorter side bicubic, center crop, OpenAI mean and std",
        dim=768,
    ),
    _variant(
        "pmcclip",
        "pmcclip-notebook",
        "PMC-CLIP as in its notebook",
        options={"attention_pool_heads": 8, "text_feature": "pooler_output"},
        image_tower="ModifiedResNet-50, attention pooling (8 heads)",
        text_tower="PubMedBERT-abstract-fulltext, pooler, no mask",
        open_questions=(
            "whether its captions were tokenized with the vocabulary of BiomedBERT-abstract, as re-users do",
        ),
    ),
    _variant("pmcclip", "pmcclip-checkpoint", "PMC-CLIP, training checkpoint", weights=("checkpoint.pt",)),
    _variant(
        "quiltnet", "quiltnet-b16", "QuiltNet-B-16", source="hf-hub:wisdomik/QuiltNet-B-16", image_tower="ViT-B/16"
    ),
    _variant(
        "quiltnet",
        "quiltnet-b16-pmb",
        "QuiltNet-B-16-PMB",
        tokenizer="BERT WordPiece, 30,522 entries",
        context=256,
        source="hf-hub:wisdomik/QuiltNet-B-16-PMB",
        image_tower="ViT-B/16",
        text_tower="PubMedBERT",
        text_source="",
    ),
    _variant(
        "genmedclip",
        "genmedclip-b32",
        "GenMedClip-B-32",
        source="hf-hub:wisdomik/GenMedClip-B-32",
        image_tower="ViT-B/32",
    ),
    _variant(
        "genmedclip",
        "genmedclip-b16-pmb",
        "GenMedClip-B-16-PMB",
        tokenizer="BERT WordPiece, 30,522 entries",
        context=256,
        source="hf-hub:wisdomik/GenMedClip-B-16-PMB",
        image_tower="ViT-B/16 (timm)",
        text_tower="PubMedBERT-abstract, [CLS], MLP",
    ),
    _variant(
        "pubmedclip",
        "pubmedclip-original",
        "PubMedCLIP, the authors' file",
        files=("PubMedCLIP_ViT32.pth",),
        source="hf-hub:sarahESL/PubMedCLIP",
        loader="open_clip",
        weights=("PubMedCLIP_ViT32.pth",),
        options={"architecture": "ViT-B-32-quickgelu"},
        licence=NOT_STATED,
    ),
    _variant(
        "medclip",
        "medclip-resnet",
        "MedCLIP-ResNet",
        source="https://storage.googleapis.com/pytrial/medclip-pretrained.zip",
        options={"image_tower": "resnet50"},
        image_tower="ResNet-50, one grey channel",
    ),
)
