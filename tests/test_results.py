"""What a run leaves behind: records cut at the resumed step, files whole or not there, a model that loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.errors import UserError
from ftcore.results import append_metrics, cut_metrics, describe_run, export, write_json


def test_records_of_steps_that_are_made_again_are_cut(tmp_path: Path) -> None:
    """Training records go by the step, evaluations by the last one done; half a line goes, too."""
    records = [
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/accuracy": 0.5},
        {"step": 4, "loss": 0.9},
        {"step": 4, "eval/accuracy": 0.6},
        {"step": 6, "loss": 0.8},
    ]
    for record in records:
        append_metrics(tmp_path, record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    cut_metrics(tmp_path, step=4, evaluated=2)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records[:3]
    cut_metrics(tmp_path / "nowhere", 0, 0)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A value that can't be written leaves the old file, and no other."""
    write_json(tmp_path / "result.json", {"name": "é"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"name": object()})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"name": "é"}
    assert [f.name for f in tmp_path.iterdir()] == ["result.json"]


def test_exported_model_loads_without_ftcore_and_agrees(open_tiny: Any) -> None:
    """transformers alone reads `model/`: same logits, same tokens, the labels' names."""
    import transformers

    job = open_tiny()
    export(job, {"eval/accuracy": 0.5})
    folder = job.run_dir / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("row 3", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [job.tokenizer("row 3")["input_ids"]]
    expected = job.strategy.model.eval()(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert "| eval/accuracy | 0.5000 |" in (folder / "README.md").read_text(encoding="utf-8")


def test_run_is_described_with_what_it_was_made_of(open_tiny: Any) -> None:
    """Versions, data, model and machine, all of it JSON."""
    job = open_tiny()
    described = json.loads(json.dumps(describe_run(job)))
    assert described["data"]["labels"] == ["no", "yes"]
    assert described["data"]["splits"]["train"]["rows"] == 32
    assert described["model"]["parameters"] == sum(p.numel() for p in job.strategy.model.parameters())
    assert described["packages"]["torch"] == torch.__version__


def test_frozen_weights_are_those_the_run_began_with(open_tiny: Any, tmp_path: Path) -> None:
    """They are read from `model.path` again: other ones there are refused, unless all weights are trained."""
    export(open_tiny(), {})
    base = tmp_path / "base"
    (tmp_path / "run" / "model").rename(base)
    job = open_tiny({"model.path": str(base)})
    write_json(job.run_dir / "run.json", describe_run(job))
    job.save(job.checkpoints / "step-1")
    frozen = job.strategy.model.get_input_embeddings().weight.requires_grad_(False)
    job.resume()
    with torch.no_grad():
        frozen[3, 3] += 1
    job.strategy.model.save_pretrained(base)
    with pytest.raises(UserError, match="has other weights than when this run began"):
        job.resume()
    frozen.requires_grad_(True)
    job.resume()
