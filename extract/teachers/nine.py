"""The nine teachers of MMKD-CLIP: where each is published, in which form, and how sure that is.

Eight names stand in the original's meta.jsonl; the ninth is inferred. `mmkd teachers check` with real weights and the
original's samples (`--golden`) settles what is marked open here.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue

from mmkd.extract.teachers.spec import TeacherSpec

BIOMEDBERT = "hf-hub:microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
NOT_STATED = "not stated"


class PublishedTeacher(BaseModel):
    """What is publicly known of one model, and the recipe that loads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slug: str
    name: str
    also_called: tuple[str, ...] = ()
    """Spellings elsewhere, those of the original's `available_clips` first."""
    source: str
    revision: str = ""
    """Commit that others pinned publicly; empty where none is known to us."""
    loader: str
    weights: tuple[str, ...] = ()
    """Empty where the loader finds the usual names."""
    weights_sha256: str = ""
    """As published; empty where we have not seen it."""
    text_source: str = ""
    context_length: int | None = None
    options: dict[str, JsonValue] = {}
    image_tower: str
    text_tower: str
    dim: int
    files: tuple[str, ...]
    """What the source publishes of the model: configuration, weights, tokenizer."""
    tokenizer: str = "CLIP BPE, 49,408 entries"
    context: int = 77
    """Tokens that the authors cut captions to; `context_length` above overrides what the files say."""
    pixels: str = "RGB, 224 px, shorter side bicubic, centre crop, OpenAI mean and std"
    """Preprocessing as published; the loader takes it from the files and its digest covers it."""
    licence: str
    """`not stated` where neither the repository nor the card says one."""
    paper: str
    open_questions: tuple[str, ...] = ()
    inferred: bool = False
    """Whether it is a guess that the original used this model at all."""

    @property
    def spec(self) -> TeacherSpec:
        """The recipe, as a user's YAML card would write it."""
        return TeacherSpec(
            slug=self.slug,
            source=self.source,
            revision=self.revision,
            loader=self.loader,
            weights=self.weights,
            weights_sha256=self.weights_sha256,
            text_source=self.text_source,
            context_length=self.context_length,
            options=self.options,
            licence=self.licence,
        )


def forked_open_clip(architecture: str) -> dict[str, JsonValue]:
    """Options for checkpoints of the fork of open_clip that UniMed-CLIP and MMKD-CLIP train with.

    Source: github.com/mbzuai-oryx/UniMed-CLIP, src/open_clip/model.py: class CLIP builds the image tower of
    `architecture` and, under the name `text_encoder`, a BERT with [CLS] pooling and a two-layer projection.
    """
    return {
        "architecture": architecture,
        "model": {
            "text_cfg": {
                "context_length": 256,
                "hf_model_name": BIOMEDBERT.removeprefix("hf-hub:"),
                "hf_tokenizer_name": BIOMEDBERT.removeprefix("hf-hub:"),
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
            }
        },
        "rename": {"text_encoder.": "text."},
    }


THE_NINE: tuple[PublishedTeacher, ...] = (
    PublishedTeacher(
        slug="bmca",
        name="BMC-CLIP",
        also_called=("BMCA", "BMC_CLIP_CF", "BMCA-CLIP", "bmcclip"),
        source="hf-hub:BIOMEDICA/BMC_CLIP_CF",
        loader="open_clip",
        weights=("BMC_CLIP_CF.pt",),
        # Plain GELU, as the CommonPool weights it started from; ViT-L-14-quickgelu loads too and is wrong.
        options={"architecture": "ViT-L-14"},
        image_tower="ViT-L/14",
        text_tower="CLIP transformer, width 768",
        dim=768,
        files=("BMC_CLIP_CF.pt",),
        licence=NOT_STATED,
        paper="BIOMEDICA, arXiv:2501.07171",
        open_questions=("whether the file needs trust_pickle: other people's loaders pass weights_only=False",),
    ),
    PublishedTeacher(
        slug="biomedclip",
        name="BiomedCLIP",
        also_called=("BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",),
        source="hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        revision="9f341de24bfb00180f1b847274256e9b65a3a32e",
        loader="open_clip",
        image_tower="ViT-B/16 (timm)",
        text_tower="BiomedBERT-abstract, [CLS], MLP",
        dim=512,
        files=("open_clip_config.json", "open_clip_pytorch_model.bin", "vocab.txt", "tokenizer.json"),
        tokenizer="BERT WordPiece of its own folder, 28,895 entries; its configuration names another",
        context=256,
        licence="MIT",
        paper="arXiv:2303.00915",
    ),
    PublishedTeacher(
        slug="unimedclip",
        name="UniMed-CLIP",
        also_called=("UniMedCLIP", "unimed"),
        source="hf-hub:UzairK/unimed-clip-vit-b16",
        revision="84a67cb0331b511b630136e4878beaa5a3fdc657",
        loader="open_clip",
        weights=("unimed-clip-vit-b16.pt",),
        text_source=BIOMEDBERT,
        options=forked_open_clip("ViT-B-16-quickgelu"),
        image_tower="ViT-B/16, QuickGELU",
        text_tower="BiomedBERT-abstract, [CLS], MLP",
        dim=512,
        files=("unimed-clip-vit-b16.pt",),
        tokenizer="BERT WordPiece, 30,522 entries",
        context=256,
        licence="CC-BY-NC-4.0",
        paper="arXiv:2412.10372",
        open_questions=("the file needs trust_pickle if it holds numpy scalars, as its ViT-L sibling does",),
    ),
    PublishedTeacher(
        slug="pmcclip",
        name="PMC-CLIP",
        also_called=("PMCCLIP",),
        source="hf-hub:datasets/axiong/pmc_oa",
        loader="pmc_clip",
        image_tower="ModifiedResNet-50, attention pooling (32 heads)",
        text_tower="PubMedBERT-abstract-fulltext, [CLS], no mask",
        dim=768,
        files=("image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth", "checkpoint.pt"),
        tokenizer="BERT WordPiece, 30,522 entries",
        licence="MIT (code; the weights lie in a data set's repository)",
        paper="arXiv:2303.07240",
        open_questions=(
            "the original may have used the authors' notebook instead: 8 heads, pooler output (pmcclip-notebook)",
        ),
    ),
    PublishedTeacher(
        slug="quiltnet",
        name="QuiltNet",
        also_called=("QuiltNet-B-32",),
        source="hf-hub:wisdomik/QuiltNet-B-32",
        loader="open_clip",
        image_tower="ViT-B/32",
        text_tower="CLIP transformer, width 512",
        dim=512,
        files=("open_clip_config.json", "open_clip_pytorch_model.bin"),
        licence="MIT",
        paper="Quilt-1M, arXiv:2306.11207",
        open_questions=("the original may have used B-16 or B-16-PMB (quiltnet-b16, quiltnet-b16-pmb)",),
    ),
    PublishedTeacher(
        slug="genmedclip",
        name="GenMedCLIP",
        also_called=("GenMedClip",),
        source="hf-hub:wisdomik/GenMedClip",
        loader="open_clip",
        image_tower="CLIP ViT (its configuration says which)",
        text_tower="CLIP transformer",
        dim=512,
        files=("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"),
        licence="MIT",
        paper="Connecting Medical Vision and Language with Localized Narratives",
        open_questions=("the original may have used B-16-PMB (genmedclip-b16-pmb)",),
    ),
    PublishedTeacher(
        slug="plip",
        name="PLIP",
        source="hf-hub:vinid/plip",
        loader="transformers",
        image_tower="ViT-B/32, QuickGELU",
        text_tower="CLIP transformer, width 512",
        dim=512,
        files=("config.json", "pytorch_model.bin", "preprocessor_config.json", "tokenizer.json"),
        licence=NOT_STATED,
        paper="A visual-language foundation model for pathology image analysis, Nature Medicine 2023",
    ),
    PublishedTeacher(
        slug="pubmedclip",
        name="PubMedCLIP",
        also_called=("PUBMEDCLIP", "pubmed-clip-vit-base-patch32"),
        source="hf-hub:flaviagiammarino/pubmed-clip-vit-base-patch32",
        loader="transformers",
        image_tower="ViT-B/32, QuickGELU",
        text_tower="CLIP transformer, width 512",
        dim=512,
        files=("config.json", "pytorch_model.bin", "preprocessor_config.json", "tokenizer.json"),
        licence="MIT",
        paper="arXiv:2112.13906",
    ),
    PublishedTeacher(
        slug="medclip",
        name="MedCLIP",
        also_called=("MedCLIP-ViT", "MEDCLIP"),
        source="https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip",
        loader="medclip",
        image_tower="Swin-tiny p4 w7, one grey channel",
        text_tower="Bio_ClinicalBERT, mean of layers 1, 2 and last",
        dim=512,
        files=("pytorch_model.bin",),
        tokenizer="Bio_ClinicalBERT WordPiece",
        pixels="grey, padded to a square, 224 px bicubic, mean 0.5862785803, std 0.2795008897, one channel thrice",
        licence=NOT_STATED,
        paper="arXiv:2210.10163",
        open_questions=(
            "that MedCLIP is the ninth teacher is inferred: no file of the original's release names it",
            "which image tower (medclip-resnet is the other)",
        ),
        inferred=True,
    ),
)
