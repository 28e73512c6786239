"""A tokenizer of 64 words, and a narrow BERT, in folders as transformers writes them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast


def write_tokens(folder: Path) -> Path:
    """Words of the tiny corpora's captions, between [CLS] and [SEP]."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "finding", "seen", "in", "plane", *map(str, range(40))]
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """Configuration and tokenizer of a BERT of one layer, 32 wide."""
    BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, pad_token_id=1,
    ).save_pretrained(folder)  # fmt: skip
    return write_tokens(folder)
