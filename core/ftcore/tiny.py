"""Tiny models with random weights and a byte-level tokenizer, made on the spot, offline.

For tests and for trying things: `model=tiny_bert`, `tiny_t5`, `tiny_llama`. Their weights are
the same in every run: they stand in for pretrained ones, whatever the run's seed.
"""

from typing import Any

__all__ = ["NAMES", "config", "tokenizer"]

NAMES = ("tiny_bert", "tiny_t5", "tiny_llama")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
PAD, BOS, EOS = 0, 1, 2


def tokenizer(name: str) -> Any:
    """Each byte of the UTF-8 text is one token; start and end tokens as the model's family has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = {
        "tiny_bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "tiny_t5": ("$A </s>", "$A </s> $B </s>"),
        "tiny_llama": ("<s> $A", "<s> $A $B"),
    }[name]
    backend.post_processor = processors.TemplateProcessing(
        single=template[0], pair=template[1], special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    types = ["token_type_ids"] if name == "tiny_bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", *types, "attention_mask"],
    )


def config(name: str) -> Any:
    """The configuration of a tiny model: 2 layers, width 32, dropout as its family has it."""
    import transformers

    shared = {
        "vocab_size": len(SPECIAL) + 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if name == "tiny_bert":
        return transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            **shared,
        )
    if name == "tiny_t5":
        return transformers.T5Config(
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=PAD,
            **shared,
        )
    return transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **shared,
    )
