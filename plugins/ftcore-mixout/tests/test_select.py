"""What is mixed in five families of models, which dropout makes way, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from ftcore import UserError
from ftcore_mixout import Mixout
from ftcore_mixout._select import linear_weights, select, turn_off_dropout

SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
BLOCK = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
OFF = ["attention.self.dropout", "attention.output.dropout", "output.dropout"]
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
SELF = [f"SelfAttention.{x}" for x in "qkvo"]
CROSS = [f"EncDecAttention.{x}" for x in "qkvo"]
FF = ["DenseReluDense.wi", "DenseReluDense.wo"]


def below(prefix: str, names: list[str]) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


def families() -> dict[str, Any]:
    """Name: config, class, new weights, what is mixed, what dropout is off."""
    t = transformers
    llama = BERT | {"num_key_value_heads": 2, "attention_dropout": 0.1}
    encoder, decoder = "encoder.block.0.layer", "decoder.block.0.layer"
    t5_mixed = [
        *below(f"{encoder}.0", SELF),
        *below(f"{encoder}.1", FF),
        *below(f"{decoder}.0", SELF),
        *below(f"{decoder}.1", CROSS),
        *below(f"{decoder}.2", FF),
    ]
    t5_off = [
        *below(f"{encoder}.0", ["dropout", "SelfAttention.dropout"]),
        *below(f"{encoder}.1", ["dropout", "DenseReluDense.dropout"]),
        *below(f"{decoder}.0", ["dropout", "SelfAttention.dropout"]),
        *below(f"{decoder}.1", ["dropout", "EncDecAttention.dropout"]),
        *below(f"{decoder}.2", ["dropout", "DenseReluDense.dropout"]),
    ]
    return {
        "bert": (
            t.BertConfig(**SMALL, **BERT),
            t.AutoModelForSequenceClassification,
            ["classifier"],
            [*below("bert.encoder.layer.0", BLOCK), "bert.pooler.dense"],
            below("bert.encoder.layer.0", OFF),
        ),
        "roberta": (
            t.RobertaConfig(**SMALL, **BERT),
            t.AutoModelForSequenceClassification,
            ["classifier.dense", "classifier.out_proj"],
            below("roberta.encoder.layer.0", BLOCK),
            below("roberta.encoder.layer.0", OFF),
        ),
        "t5": (t.T5Config(**SMALL, **T5), t.AutoModelForSeq2SeqLM, [], t5_mixed, t5_off),
        "gpt2": (
            t.GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=32),
            t.AutoModelForCausalLM,
            [],
            below("transformer.h.0", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
            below("transformer.h.0", ["attn.attn_dropout", "attn.resid_dropout", "mlp.dropout"]),
        ),
        "llama": (
            t.LlamaConfig(**SMALL, **llama, tie_word_embeddings=True),
            t.AutoModelForCausalLM,
            [],
            [
                *below("model.layers.0.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
                *below("model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
            ],
            ["model.layers.0.self_attn.attention_dropout"],
        ),
    }


@pytest.fixture(params=["bert", "roberta", "t5", "gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> Any:
    """A model of random weights, the names of its new ones, and what is expected of it."""
    config, auto, new, mixed, off = families()[request.param]
    torch.manual_seed(0)
    model = auto.from_config(config)
    return model, {f"{n}.weight" for n in new}, {f"{n}.weight" for n in mixed}, set(off)


def set_up(model: Any, new: Any = (), **options: Any) -> Mixout:
    """Mixout with what `load_model` and `setup_model` of a run do."""
    plugin = Mixout(**options)
    wrapper: Any = plugin.load_model()
    next(wrapper)
    with pytest.raises(StopIteration):
        wrapper.send(model)
    plugin.setup_model(model, frozenset(new))
    return plugin


def test_which_weights_are_mixed(family: Any) -> None:
    """Pretrained linear weights: no bias, norm, embedding, tied weight or new head."""
    model, new, mixed, _ = family
    assert set(set_up(model, new).describe()["mixed"]) == mixed


def test_ties_and_parameters_stay(family: Any) -> None:
    """The same parameters under the same names, shared as before, and none more."""
    model, new, _, _ = family
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = model.get_output_embeddings() is not None
    set_up(model, new)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert not tied or model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_which_dropout_is_off(family: Any) -> None:
    """That of blocks with mixed weights, module or float; the embeddings' and the head's stay."""
    model, new, _, off = family
    assert set(set_up(model, new).describe()["dropout_off"]) == off
    left = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {n for n, p in left.items() if p == 0} == {n for n in off if n in left}


def test_training_mode_is_deterministic(family: Any) -> None:
    """With the embeddings' dropout set to 0 too, two forwards in training mode are equal."""
    model, new, _, _ = family
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.randint(3, 40, (2, 9))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model.train()
    assert not torch.equal(*(model(**inputs).logits for _ in range(2)))
    set_up(model, new)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.p = 0.0  # of the embeddings and the head: in no block with mixed weights
    assert torch.equal(*(model(**inputs).logits for _ in range(2)))


def test_dropout_stays_where_a_pattern_leaves_weights_alone() -> None:
    """Attention is excluded: its dropout is left as it was."""
    model = transformers.AutoModelForSequenceClassification.from_config(families()["bert"][0])
    found = set_up(model, exclude=["*attention*", "classifier.weight"]).describe()
    assert found["dropout_off"] == ["bert.encoder.layer.0.output.dropout"]
    assert found["mixed"] == [
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "bert.pooler.dense.weight",
    ]


def test_rates_that_a_forward_reads_from_the_config() -> None:
    """Falcon's and GPT-Neo's attention ask the config each time; the export has its values back."""
    small = {"hidden_size": 16, "num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 2}
    config = transformers.GPTNeoConfig(**SMALL, **small, attention_dropout=0.3, embed_dropout=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    plugin = set_up(model)
    assert (model.config.attention_dropout, model.config.embed_dropout) == (0.0, 0.2)
    plugin.on_export()
    assert (model.config.attention_dropout, model.config.embed_dropout) == (0.3, 0.2)


def test_a_pretrained_head_of_its_own_is_a_linear_weight_like_others() -> None:
    """An output layer that is not tied and was pretrained is mixed."""
    config = families()["llama"][0]
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "lm_head.weight" in set_up(model).describe()["mixed"]
    assert "lm_head.weight" not in set_up(model, new={"lm_head.weight"}).describe()["mixed"]


def test_what_another_plugin_adds_was_not_pretrained() -> None:
    """A layer that is in the model only after loading is no candidate."""
    model = transformers.AutoModelForCausalLM.from_config(families()["gpt2"][0])
    candidates = linear_weights(model)
    model.extra = torch.nn.Linear(4, 4)
    assert "extra.weight" not in select(candidates, model, (), (), ())


def with_adapter(model: Any) -> None:
    """Low-rank factors beside a frozen layer, named as PEFT names them."""
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.requires_grad_(False)
    layer.lora_A = torch.nn.Parameter(torch.zeros(2, 16))


def quantised(model: Any) -> None:
    """8-bit weights in a layer."""
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_adapter, "LoRA: the base keeps its pretrained weights"),
        (quantised, "quantised base: its weights"),
    ],
)
def test_adapters_and_quantised_bases_are_refused(change: Callable[[Any], None], says: str) -> None:
    """In a sentence that says why."""
    model = transformers.AutoModelForCausalLM.from_config(families()["llama"][0])
    change(model)
    with pytest.raises(UserError, match=says):
        set_up(model)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    """With names that there are."""
    model = transformers.AutoModelForCausalLM.from_config(families()["llama"][0])
    with pytest.raises(
        UserError, match=rf"plugin.mixout.{option}: .* matches '\*.nowhere'; there are: model\."
    ):
        set_up(model, **{option: ["*.nowhere"]})


def test_a_model_with_nothing_to_mix_is_refused() -> None:
    """Everything excluded is no run with mixout."""
    model = transformers.AutoModelForCausalLM.from_config(families()["llama"][0])
    with pytest.raises(UserError, match="no pretrained linear layer"):
        set_up(model, exclude=["*"])


def test_frozen_weights_are_not_mixed() -> None:
    """They are their target."""
    model = transformers.AutoModelForCausalLM.from_config(families()["llama"][0])
    model.model.layers[0].mlp.requires_grad_(False)
    assert not any("mlp" in name for name in set_up(model).describe()["mixed"])


def test_turning_off_twice_changes_nothing_more() -> None:
    """What is off is not found again."""
    model = transformers.AutoModelForSequenceClassification.from_config(families()["bert"][0])
    mixed = linear_weights(model)
    assert turn_off_dropout(model, mixed)[0]
    assert turn_off_dropout(model, mixed) == ([], [])
