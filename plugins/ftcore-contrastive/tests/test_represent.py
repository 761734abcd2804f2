"""Pooling on either side of the padding, and that it is what each family's head reads."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ftcore import UserError, tiny
from ftcore_contrastive._represent import hidden_states, is_decoder_only, output_projection, pool, resolve

STATES = torch.arange(2 * 4 * 1, dtype=torch.float32).view(2, 4, 1)  # row 0 holds 0..3, row 1 holds 4..7


@pytest.mark.parametrize(
    ("mask", "first", "last", "mean"),
    [
        ([[1, 1, 1, 0], [1, 1, 0, 0]], [0, 4], [2, 5], [1, 4.5]),
        ([[0, 1, 1, 1], [0, 0, 1, 1]], [1, 6], [3, 7], [2, 6.5]),
        (None, [0, 4], [3, 7], [1.5, 5.5]),
    ],
    ids=["right", "left", "none"],
)
def test_pool(mask: Any, first: list[float], last: list[float], mean: list[float]) -> None:
    """Padding on the right, on the left, and no mask at all."""
    mask = None if mask is None else torch.tensor(mask)
    for kind, expected in (("first_token", first), ("last_token", last), ("mean", mean)):
        assert pool(STATES, mask, kind).flatten().tolist() == expected


def config(kind: str) -> Any:
    """A tiny config with three classes and no dropout."""
    common = {"num_labels": 3, "pad_token_id": 0, "eos_token_id": 2}
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    made = {
        "bert": lambda: transformers.BertConfig(**small, **common),
        "roberta": lambda: transformers.RobertaConfig(**small, max_position_embeddings=64, **common),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=16, **common
        ),
        "llama": lambda: transformers.LlamaConfig(**small, **common),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, **common),
        "t5": lambda: transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
            decoder_start_token_id=0, **common,
        ),
        "bart": lambda: transformers.BartConfig(
            vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            decoder_start_token_id=2, **common,
        ),
    }  # fmt: skip
    return made[kind]()


KINDS = ("bert", "roberta", "distilbert", "llama", "gpt2", "t5", "bart")


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config(kind)).eval()


def inputs(side: str = "right") -> dict[str, torch.Tensor]:
    """Two rows that end in the end token, the second padded by two."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 7, 9, 2, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    if side == "left":
        ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("kind", "side"), [*((k, "right") for k in KINDS), ("llama", "left"), ("gpt2", "left")]
)
@pytest.mark.parametrize("representation", ["auto", "pooled"])
def test_it_is_what_the_head_reads(kind: str, side: str, representation: str) -> None:
    """The head's own layers on our representation give the model's logits."""
    model, batch, seen = model_of(kind), inputs(side), []
    projection = output_projection(model)
    with projection.register_forward_pre_hook(lambda module, given: seen.append(given[0])), torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        if representation == "pooled":
            (states,) = seen
            states = pool(states, batch["attention_mask"], "last_token") if states.ndim == 3 else states
            torch.testing.assert_close(projection(states), outputs.logits, rtol=1e-6, atol=1e-7)
            return
        states = pool(hidden_states(outputs, -1), batch["attention_mask"], resolve("auto", model.config))
        torch.testing.assert_close(head(model)(states), outputs.logits)


def head(model: Any) -> Any:
    """From the representation to the logits, as the family does it."""
    name = model.config.model_type
    if name == "bert":
        return lambda x: model.classifier(model.bert.pooler(x[:, None]))
    if name == "distilbert":
        return lambda x: model.classifier(model.pre_classifier(x).relu())
    if name == "roberta":
        return lambda x: model.classifier(x[:, None])
    return (
        {"t5": "classification_head", "bart": "classification_head"}.get(name) and model.classification_head
    ) or model.score


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_are_told_apart(kind: str) -> None:
    """By being a causal and no masked language model; the first token of one is refused."""
    decodes = kind in ("llama", "gpt2")
    assert is_decoder_only(config(kind)) == decodes
    assert resolve("auto", config(kind)) == ("first_token" if KINDS.index(kind) < 3 else "last_token")
    if decodes:
        with pytest.raises(UserError, match=f"a decoder \\({kind}\\) has not seen the text"):
            resolve("first_token", config(kind))
    assert is_decoder_only(tiny.config("tiny_llama"))


def test_what_can_not_be_read_is_refused() -> None:
    """No hidden states, no such layer, a mask of another length, no head."""
    with pytest.raises(UserError, match="no hidden_states"):
        hidden_states(SimpleNamespace(hidden_states=None), -1)
    with pytest.raises(UserError, match=r"layer must be in \[-2, 1\].*got 2"):
        hidden_states(SimpleNamespace(hidden_states=(STATES, STATES)), 2)
    with pytest.raises(UserError, match="4 tokens do not match the attention mask of 3"):
        pool(STATES, torch.ones(2, 3, dtype=torch.int64), "mean")
    model = model_of("bert")
    model.classifier = torch.nn.Identity()
    with pytest.raises(UserError, match="no linear head with 3 outputs"):
        output_projection(model)
