"""A tiny stock model, as a checkpoint from a hub would lie on a disk."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_stock_model(folder: Path, texts: list[str], std: float = 0.02) -> Path:
    """A llama of two layers with a byte-level tokenizer, a chat template and a licence.

    Args:
        folder: made if missing.
        texts: what its tokenizer is made from.
        std: of its weights; from 0.2 on it matters whom a token attends to.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    own.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("free")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer.get_vocab())}
    config = LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=std)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
