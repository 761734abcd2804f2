"""What is trained, and that the merged model is base and adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftcore import UserError
from ftcore_lora import LoRA

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CFG: Any = SimpleNamespace(model=SimpleNamespace(add_tokens=None, path="base"), seed=0)


@pytest.fixture
def bert() -> Any:
    """A tiny classifier whose head is new."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).eval()


NEW = frozenset({"classifier.weight", "classifier.bias"})


def test_adapters_and_the_head_are_trained(bert: Any) -> None:
    """Nothing else is; the model answers as before, and after the merge as with trained adapters."""
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
    plugin.on_export(bert)
    torch.testing.assert_close(bert(ids).logits, adapted)
    assert not any("lora" in name or "base_layer" in name for name in bert.state_dict())


def test_modules_that_are_not_there_are_refused(bert: Any) -> None:
    """With the option's name."""
    with pytest.raises(UserError, match=r"plugin\.lora\.include=\['nothing'\]"):
        LoRA(include=["nothing"]).setup_model(bert, CFG, NEW)


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
    arguments += ["trainer.strategy=single"]
    ended = subprocess.run(
        [sys.executable, "-m", "ftcore", *arguments],
        cwd=tmp_path,
        env={**ENVIRONMENT, "FTCORE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    import peft
    from transformers import AutoModelForSequenceClassification as Auto

    ids = torch.arange(8)[None]
    merged = Auto.from_pretrained(run / "model").eval()(ids).logits
    whole = peft.PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=2), run / "adapter").eval()
    torch.testing.assert_close(whole(ids).logits, merged, rtol=1e-4, atol=1e-5)
