"""Tiny random fp32 models with a real tokenizer, written once per session.

The weights are scaled so that attention decides the next token (a wrong mask, position or cached
key changes the text) and greedy text still falls into loops often enough for n-gram drafts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 448
TINY_VOCAB_SIZE = 12
FIRST_WORD = 259
"""Tokens from here on are words and parts of words."""
MAX_MODEL_LEN = 512
WINDOW = 32
EOS = 1
WORDS = (
    "the a an of to and in is was for on are with as his they be at one have this from or had by "
    "hot but some what there we can out other were all your when up use word how said each she "
    "which do their time if will way about many then them would write like so these her long make "
    "thing see him two has look more day could go come did my sound no most number who over know "
    "water than call first people may down side been now find true false name age city red green"
).split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens whose merges are common words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(9)], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
    )
    return fast


COMMON = dict(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=MAX_MODEL_LEN,
    bos_token_id=0,
    eos_token_id=EOS,
    pad_token_id=2,
    dtype="float32",
)


def llama(vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, **COMMON))


def sliding() -> PreTrainedModel:
    """Gemma 3 with three sliding layers of WINDOW tokens and one full layer."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            sliding_window=WINDOW,
            query_pre_attn_scalar=32,
            tie_word_embeddings=False,
            **COMMON,
        )
    )


def randomize(model: PreTrainedModel, seed: int, embed_std: float = 1.0) -> PreTrainedModel:
    """Gaussian weights of unit gain, so that logits have a standard deviation of about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = embed_std if "embed" in name else weight.shape[1] ** -0.5
            weight.data = torch.randn(weight.shape, generator=generator) * std
    return model


def save(model: PreTrainedModel, path: Path) -> None:
    """Writes the model, with a tokenizer if its vocabulary is that tokenizer's.

    Tokens that are no plain text get logit 0, so they are never the most probable ones.
    """
    if model.config.vocab_size == VOCAB_SIZE:
        tokenizer = build_tokenizer()
        texts = tokenizer.batch_decode([[token] for token in range(VOCAB_SIZE)])
        odd = [t for t, text in enumerate(texts) if not (text.isascii() and text.isprintable())]
        model.lm_head.weight.data[[*range(3), *odd]] = 0
        tokenizer.save_pretrained(path)
    model.save_pretrained(path)


BUILDERS = {
    "llama": lambda: randomize(llama(), seed=1),
    "sliding": lambda: randomize(sliding(), seed=2, embed_std=64**-0.5),
    "tiny_vocab": lambda: randomize(llama(TINY_VOCAB_SIZE), seed=3),
}
