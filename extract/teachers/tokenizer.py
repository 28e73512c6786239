"""Captions to token ids, exactly as a teacher's authors do it, with the length that each caption really has."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe, get_clean_fn

from mmkd.base.errors import TeacherError, faults_as
from mmkd.extract.teachers.source import TOKENIZER_FILES, file_sha256
from mmkd.store.hierarchy import canonical_sha256

# Steps between which padding costs at most a half; few, because each is a shape of its own for the kernels.
_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class TokenizerPlan:
    """Tokenizer description, before loading."""

    context_length: int
    folder: Path | None = None
    """Folder with a Hugging Face tokenizer; None for the BPE that comes with open_clip."""
    clean: str | None = None
    """open_clip's cleaning of captions (`whitespace`, `lower`, `canonicalize`); None: the caption as it is."""
    mode: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the tokenizer's class."""
    kind: str = "words"
    """`bert`: the tower masks padding and reads [CLS]; `clip`: it reads the highest id; `words`: neither is known."""
    eos_id: int | None = None
    """Id that the text tower reads as the end of a caption, where it looks for one."""
    pad_id: int | None = None
    """Id that the text tower takes for padding, where it does."""
    inert_padding: bool = False
    """True where nothing that stands behind a caption reaches its feature: a causal tower that reads the end token, or
    one that masks padding and does not pool it. Such captions need not be padded to the whole context."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that a caption may be padded to, ascending; the last is the context."""
        shorter = (length for length in _LENGTHS if length < self.context_length)
        return (*(shorter if self.inert_padding else ()), self.context_length)

    def sha256(self) -> str:
        """Hash of the tokenizer's files and of all settings that change an id."""
        files = {"bpe": Path(default_bpe())} if self.folder is None else {n: self.folder / n for n in TOKENIZER_FILES}
        hashes = {name: file_sha256(path) for name, path in files.items() if path.is_file()}
        return canonical_sha256({"files": hashes, "clean": self.clean, "mode": self.mode, "settings": self.settings})

    def build(self) -> "Tokenizer":
        return BuiltInBpe(self) if self.folder is None else FolderTokenizer(self)


class BuiltInBpe:
    """The byte-pair encoding of OpenAI's CLIP, as open_clip bundles it."""

    def __init__(self, plan: TokenizerPlan) -> None:
        self.lengths = plan.lengths
        self._tokenizer = SimpleTokenizer(
            context_length=plan.context_length, clean=plan.clean or "lower", **plan.settings
        )

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Return int64 (B, L) and untruncated lengths, start and end tokens included."""
        return self._tokenizer(captions), [len(self._tokenizer.encode(caption)) + 2 for caption in captions]

    def check(self, slug: str, vocabulary: int) -> None:
        """Refuse a tower with fewer embeddings than the encoding has tokens. Raises TeacherError with both sizes."""
        if self._tokenizer.vocab_size > vocabulary:
            raise TeacherError(
                f"teacher {slug!r}: its text tower has {vocabulary} token embeddings, CLIP's BPE has "
                f"{self._tokenizer.vocab_size} tokens: it needs a tokenizer of its own; name it with hf_tokenizer_name"
            )


class FolderTokenizer:
    """A Hugging Face tokenizer from a folder; nothing is looked up on the network, no code of the folder runs."""

    def __init__(self, plan: TokenizerPlan) -> None:
        assert plan.folder is not None
        self._plan = plan
        self.lengths = plan.lengths
        errors = (OSError, ValueError, KeyError, TypeError, AttributeError)
        with faults_as(
            TeacherError, errors, f"the tokenizer in {plan.folder} cannot be loaded", "; download its files again"
        ):
            self._wrapped = HFTokenizer(
                str(plan.folder),
                context_length=plan.context_length,
                clean=plan.clean or "whitespace",
                tokenizer_mode=plan.mode or None,
                local_files_only=True,
                trust_remote_code=False,
                **plan.settings,
            )
        self._inner = self._wrapped.tokenizer
        if plan.clean is None:
            self._wrapped.clean_fn = str
        self._clean = get_clean_fn(plan.clean) if plan.clean else str

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Return int64 (B, L) and untruncated lengths, special tokens included."""
        cleaned = [self._clean(caption) for caption in captions]
        whole = self._inner(cleaned, truncation=False, padding=False, verbose=False).input_ids
        return self._wrapped(captions), [len(ids) for ids in whole]

    def check(self, slug: str, vocabulary: int) -> None:
        """Refuse a tokenizer whose ids or special tokens the text tower cannot mean. Raises TeacherError with what was
        expected and what was found."""
        plan, inner, size = self._plan, self._inner, len(self._inner)
        other_pad = plan.pad_id is not None and inner.pad_token_id != plan.pad_id
        no_ends = plan.kind == "bert" and None in (inner.cls_token_id, inner.sep_token_id)
        other_end = plan.eos_id is not None and inner.eos_token_id != plan.eos_id
        not_highest = plan.kind == "clip" and inner.eos_token_id != size - 1
        problems = (
            (size > vocabulary, f"has {size} tokens, the text tower {vocabulary} embeddings"),
            (other_pad, f"pads with id {inner.pad_token_id}, the text tower with {plan.pad_id}"),
            (no_ends, "has no [CLS] or [SEP] token, which a BERT tower reads"),
            (other_end, f"ends a caption with id {inner.eos_token_id}, the text tower looks for {plan.eos_id}"),
            (not_highest, "does not end a caption with its highest id, which a CLIP tower reads"),
        )
        if problem := next((problem for wrong, problem in problems if wrong), None):
            raise TeacherError(
                f"teacher {slug!r}: the tokenizer in {plan.folder} {problem}: this is another teacher's tokenizer; "
                "name its own with text_source"
            )


Tokenizer = BuiltInBpe | FolderTokenizer
