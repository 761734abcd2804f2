"""What is trained, and that the merged model is base and adapter."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftcore import State, UserError
from ftcore_lora import LoRA, modules
from tests import cli

CFG: Any = SimpleNamespace(model=SimpleNamespace(add_tokens=None, path="base"), seed=0)


@pytest.fixture
def bert() -> Any:
    """A tiny classifier whose head is new."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).eval()


NEW = frozenset({"classifier.weight", "classifier.bias"})


class Engine(torch.nn.Module):
    """What a strategy may wrap a model in, as DeepSpeed does."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def test_adapters_and_the_head_are_trained(bert: Any) -> None:
    """Nothing else is; the model answers as before, and after the merge as with trained adapters.

    It is evaluated as it is exported, bit for bit, and goes on training as it was.
    """
    ids = torch.arange(8)[None]
    before, plugin = bert(ids).logits, LoRA()
    plugin.setup_model(bert, CFG, NEW)
    trained = {name for name, param in bert.named_parameters() if param.requires_grad}
    assert all("lora_" in name or name in NEW for name in trained)
    assert trained > NEW
    torch.testing.assert_close(bert(ids).logits, before)
    with torch.no_grad():
        for name, param in bert.named_parameters():
            if "lora_B" in name:
                param.normal_()
    adapted = bert(ids).logits
    assert not torch.allclose(adapted, before)
    predicting: Any = plugin.predict()
    next(predicting)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = bert(ids).logits
    with pytest.raises(StopIteration):
        predicting.send(None)
    assert torch.equal(bert(ids).logits, adapted)
    plugin.on_export(Engine(bert))
    torch.testing.assert_close(bert(ids).logits, adapted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bert(ids).logits, predicted)
    assert not any("lora" in name or "base_layer" in name for name in bert.state_dict())


def test_what_is_new_is_trained_whole(bert: Any) -> None:
    """`all-linear` leaves the head to itself; a name that fits modules of both is the pretrained ones'."""
    every = modules(bert, ["all-linear"], NEW)
    assert len(every) == 7
    assert "bert.pooler.dense" in every
    assert modules(bert, ["dense"], NEW) == [n for n in every if n.endswith("dense")]
    assert "bert.pooler.dense" not in modules(bert, ["dense"], NEW | {"bert.pooler.dense.weight"})
    plugin = LoRA(include=["all-linear"])
    plugin.setup_model(bert, CFG, NEW)
    assert plugin.describe()["adapted"] == every
    assert {n for n, p in bert.named_parameters() if p.requires_grad} >= NEW


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (
            ["nothing"],
            r"no pretrained module is called 'nothing'; linear layers are dense, key, query, value",
        ),
        (["query", "nothing"], "no pretrained module is called 'nothing'"),
        (["all-linear", "query"], "is called 'all-linear'; .* with no other name"),
        (["classifier"], "no pretrained module is called 'classifier'"),
        (["LayerNorm"], "embeddings.LayerNorm is a LayerNorm; only linear layers and embeddings"),
        (["encoder"], "bert.encoder is a BertEncoder"),
    ],
)
def test_modules_that_can_t_be_adapted_are_refused(bert: Any, include: list[str], message: str) -> None:
    """Each name by itself: none is left out in silence."""
    with pytest.raises(UserError, match=rf"plugin\.lora\.include: .*{message}"):
        LoRA(include=include).setup_model(bert, CFG, NEW)


def test_a_tied_weight_is_refused() -> None:
    """Merged into one of two layers, the update would be in both; all-linear leaves such a layer out."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ftcore import tiny

    llama = AutoModelForCausalLM.from_config(tiny.config("tiny_llama"))
    t5 = AutoModelForSeq2SeqLM.from_config(tiny.config("tiny_t5"))
    for model, name in ((llama, "embed_tokens"), (llama, "lm_head"), (t5, "shared")):
        with pytest.raises(UserError, match=f"{name} shares its weight"):
            modules(model, [name], frozenset())
    assert "lm_head" not in modules(llama, ["all-linear"], frozenset())


def test_a_model_that_peft_has_no_choice_for_names_what_there_is(bert: Any) -> None:
    """In ftcore's words, not in those of peft's own options."""
    bert.config.model_type = "unheard-of"
    with pytest.raises(
        UserError, match="no choice for a model of type unheard-of; linear layers are dense, "
    ):
        LoRA().setup_model(bert, CFG, NEW)


def test_an_adapter_is_of_the_run_that_ended(bert: Any, tmp_path: Path) -> None:
    """One of a run before it does not stay beside its model, and a run without an export writes none."""
    state = State(model=bert, tokenizer=None, device=torch.device("cpu"), run_dir=tmp_path, step=1, total=1)
    exported, pruned = LoRA(save_adapter=True), LoRA(save_adapter=True)
    pruned.setup_model(copy.deepcopy(bert), CFG, NEW)
    exported.setup_model(bert, CFG, NEW)
    exported.on_export(bert)
    exported.on_train_end(state)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    pruned.on_train_end(state)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # what peft asks of transformers
def test_an_adapter_on_its_base_is_the_merged_model(bert: Any, tmp_path: Path) -> None:
    """A run by the command line; its checkpoints hold no frozen weight."""
    from ftcore.tiny import tokenizer

    base, run = tmp_path / "base", tmp_path / "run"
    tokens = tokenizer("tiny_bert")
    bert.bert.resize_token_embeddings(len(tokens))
    bert.bert.save_pretrained(base)
    tokens.save_pretrained(base)
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["+plugin=lora", "plugin.lora.save_adapter=true", "model=pretrained", f"model.path={base}"]
    arguments += ["data=files", "data.train=t.jsonl", "train.steps=3", "optim.lr=0.1", f"hydra.run.dir={run}"]
    arguments += ["trainer.strategy=single", "plugin.lora.include=[query,dense,word_embeddings]"]
    ended = cli.run(arguments, tmp_path)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    import peft
    from transformers import AutoModelForSequenceClassification as Auto

    ids = torch.arange(8)[None]
    merged = Auto.from_pretrained(run / "model").eval()(ids).logits
    whole = peft.PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=2), run / "adapter").eval()
    torch.testing.assert_close(whole(ids).logits, merged, rtol=1e-4, atol=1e-5)
