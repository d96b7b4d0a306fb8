"""The embedded policy for machines without GPU: a small Qwen2 model and its tokenizer, made from the warm-start corpus.

Saved as an ordinary Hugging Face folder: nothing after this file knows whether the policy has 1.1 M or 7 B parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

END = "<|endoftext|>"


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; any text survives encode and decode unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def policy_config(vocab_size: int = 1536, *, end_id: int | None = None) -> Qwen2Config:
    """The embedded policy's architecture: 1.1 M parameters in four layers of width 128."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
        architectures=["Qwen2ForCausalLM"],
    )


def create_policy(corpus: Iterable[str], folder: Path, *, seed: int, vocab_size: int = 1536) -> None:
    """Write a randomly initialised policy and its tokenizer, trained on `corpus`, into `folder`."""
    tokenizer = train_tokenizer(corpus, vocab_size)
    torch.manual_seed(seed)
    # vLLM pads the vocabulary to a multiple of 64; the same size here keeps both heads alike.
    config = policy_config(-(-len(tokenizer) // 64) * 64, end_id=tokenizer.eos_token_id)
    transformers_logging.disable_progress_bar()
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
