"""By the command line: one gradient however rows are laid out, and talking to the result."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.cli import run


def ftcore(folder: Path, *commands: tuple[list[str], str, int]) -> list[str]:
    """`ftcore ARGUMENTS` one after the other, (arguments, standard input, ranks) each; what they printed."""
    printed = []
    for arguments, said, ranks in commands:
        ended = run(arguments, folder, said=said, ranks=ranks)
        assert ended.returncode in (0, 2), ended.stdout + ended.stderr
        printed.append(ended.stdout + ended.stderr)
    return printed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eleven prompts of different lengths; two of them are evaluated."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"say {'ab' * i}", "completion": "ba" * (1 + i % 4)} for i in range(1, 12)]
    found = []
    for split, part in (("train", rows), ("validation", rows[:2])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        found.append(f"data.{split}={path}")
    length = ["data.max_length=48", "model.dropout=0", "task.max_new_tokens=4", "plugin.instruct.overlap=off"]
    steps = ["train.batch_size=100", "train.steps=2", "train.eval_every=2", "train.log_every=1"]
    return ["+plugin=instruct", "data=files", "data.test=null", *found, *length, *steps]


def records(run_dir: Path) -> list[Any]:
    """Loss and gradient norm of each step, and the evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "eval/nll")
    return [line[key] for line in lines for key in keys if key in line]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_one_gradient_for_every_layout(tmp_path: Path, data: list[str], model: str) -> None:
    """Packed and padded, whole and in micro-batches, on one rank and two; then the model answers."""
    layouts = ["plugin.instruct.pack=true,false", "train.micro_batch_size=1,100", f"model={model}"]
    name = "hydra.sweep.subdir=${plugin.instruct.pack}-${train.micro_batch_size}"
    sweep = ["-m", *data, *layouts, name, "hydra.sweep.dir=one"]
    two = [*data, f"model={model}", "trainer=ddp", "trainer.device=cpu", "train.micro_batch_size=1"]
    printed = ftcore(
        tmp_path,
        (sweep, "", 1),
        ([*two, "hydra.run.dir=two"], "", 2),
        (["chat", "one/True-1", "--max-new-tokens=3"], "hello\n\n/reset\nsay ab\n/quit\nnever read\n", 1),
        (["chat", "one"], "", 1),
    )
    expected = records(tmp_path / "one" / "False-100")
    assert len(expected) == 5
    runs = [*(d for d in (tmp_path / "one").iterdir() if d.is_dir()), tmp_path / "two"]
    assert len(runs) == 5
    for found in runs:
        assert records(found) == pytest.approx(expected, rel=1e-5), found
    assert len(printed[2].splitlines()) == 2
    assert "no run has finished there" in printed[3]


QUESTIONS: dict[str, Any] = {
    "alpaca": lambda i: {"instruction": f"Do {i}."},
    "chat": lambda i: {"messages": [TURNS[0], TURNS[1], {"role": "user", "content": f"n{i}"}]},
    "prompt": lambda i: {"prompt": f"p{i}="},
    "share": lambda i: {"conversations": [{"from": "human", "value": f"s{i}"}]},
    "task": lambda i: {"instruction": "Say.", "input": f"t{i}", "choices": ["aa", "bb", "cc"]},
}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]


def answered(name: str, row: dict[str, Any], answer: str) -> dict[str, Any]:
    """A row of `QUESTIONS` with its answer."""
    if name == "chat":
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
    if name == "share":
        return {"conversations": [*row["conversations"], {"from": "gpt", "value": answer}]}
    return {**row, {"alpaca": "output", "prompt": "completion", "task": "target"}[name]: answer}


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_a_saved_run_answers_and_scores_files_as_it_did(tmp_path: Path, model: str) -> None:
    """Rows of every format are asked as in evaluation, with their answers or without, and scored so."""
    for folder in ("asked", "full"):
        (tmp_path / folder).mkdir()
    for number, (name, make) in enumerate(QUESTIONS.items()):
        asked = [make(i) for i in range(3)]
        full = [answered(name, row, "abcdefghijklmno"[3 * number + i] * 2) for i, row in enumerate(asked)]
        for folder, rows in (("asked", full if name == "prompt" else asked), ("full", full)):
            (tmp_path / folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    bad = [{"prompt": ""}, {"prompt": "p" * 99}]
    (tmp_path / "asked" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bad))
    options = ["few_shot=0", "variants=1", "overlap=off"]
    sizes = ["train.steps=30", "train.batch_size=16", "optim.lr=1e-2", "task.max_new_tokens=4"]
    data = ["data=files", "data.train=full", "data.validation=full", "data.max_length=64"]
    words = ["+plugin=instruct", f"model={model}", *data, *sizes, *(f"plugin.instruct.{o}" for o in options)]
    printed = ftcore(
        tmp_path,
        ([*words, "train.eval_every=30", "hydra.run.dir=run"], "", 1),
        (["evaluate", "run", "data=full", "--json"], "", 1),
        (["predict", "run", "asked", "--to", "answers.jsonl"], "", 1),
    )
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    scored = json.loads(printed[1][printed[1].index("{") :])
    assert {k.replace("test/", "eval/"): v for k, v in scored.items()} == metrics
    then = pq.read_table(tmp_path / "run" / "predictions" / "validation.parquet").to_pylist()
    kept = [{k: row[k] for k in ("row", "choice_prediction", "prediction")} for row in then]
    assert len({row["prediction"] for row in kept}) > 1
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[:15] == kept
    assert lines[15] == {"row": 15, "choice_prediction": None, "prediction": None}
    assert "1 of 17 rows are unusable (0-based): 1 empty prompt (x row 0)" in printed[2]
    assert "1 of 16 rows are cut to data.max_length=64 tokens" in printed[2]


def test_warm_up_trains_the_new_embeddings_alone(tmp_path: Path, data: list[str]) -> None:
    """For its steps, and on two ranks as on one; afterwards everything is trained."""
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("abab\n\nbaba\n")
    words = [
        *data,
        "model=tiny_llama",
        f"model.add_tokens={tokens}",
        "optim.weight_decay=0",
        "optim.warmup=0",
    ]
    one = [*words, "plugin.instruct.warm_new_tokens=1"]
    two = [*one, "trainer=ddp", "trainer.device=cpu", "train.micro_batch_size=1"]
    printed = ftcore(
        tmp_path,
        ([*one, "train.steps=1", "hydra.run.dir=warm"], "", 1),
        ([*one, "hydra.run.dir=one"], "", 1),
        ([*two, "hydra.run.dir=two"], "", 2),
        ([*words, "optim.weight_decay=0.1", "plugin.instruct.warm_new_tokens=1"], "", 1),
        ([*data, "model=tiny_llama", "plugin.instruct.warm_new_tokens=1"], "", 1),
    )
    begun = _weights(tmp_path, words)
    warm, after = (load_file(tmp_path / d / "model" / "model.safetensors") for d in ("warm", "one"))
    for name, before in begun.items():
        if name in warm:
            rows = (warm[name] != before).reshape(len(before), -1).any(dim=1).nonzero().flatten().tolist()
            assert rows == ([261, 262] if name == "model.embed_tokens.weight" else []), name
            assert not torch.equal(after[name], before), name
    assert records(tmp_path / "two") == pytest.approx(records(tmp_path / "one"), rel=1e-5)
    assert "set optim.weight_decay=0" in printed[3]
    assert "no tokens are added; set model.add_tokens=FILE" in printed[4]


def _weights(folder: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """The model's weights before training."""
    from ftcore.compose import compose
    from ftcore.models import load_model, load_tokenizer

    cfg = compose([*overrides, f"hydra.run.dir={folder}/none"])
    return dict(load_model(cfg, load_tokenizer(cfg), [], "AutoModelForCausalLM").state_dict())


def untied_llama(folder: Path) -> Path:
    """A tiny Llama whose output layer has a weight of its own, in a directory."""
    from transformers import LlamaForCausalLM

    from ftcore import tiny

    config = tiny.config("tiny_llama")
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer("tiny_llama").save_pretrained(folder)
    return folder


def test_chunked_and_full_loss_train_alike(tmp_path: Path, data: list[str]) -> None:
    """`loss` changes time and memory, not the result; what can't be is refused."""
    kinds = ["model=tiny_llama", "plugin.instruct.loss=chunked,trained,full"]
    places = ["hydra.sweep.dir=loss", "hydra.sweep.subdir=${plugin.instruct.loss}"]
    refused = [*data, "model=tiny_t5", "plugin.instruct.loss=chunked"]
    llama = untied_llama(tmp_path / "untied")
    adapted = [*data, f"model.path={llama}", "model=pretrained", "plugin.instruct.loss=chunked"]
    adapted = ["+plugin=[instruct,lora]" if a == "+plugin=instruct" else a for a in adapted]
    adapted += ["plugin.lora.include=[lm_head]"]  # whose update is not in its weight
    commands = (["-m", *data, *kinds, *places], refused, adapted)
    printed = ftcore(tmp_path, *((arguments, "", 1) for arguments in commands))
    expected = records(tmp_path / "loss" / "full")
    for kind in ("chunked", "trained"):
        assert records(tmp_path / "loss" / kind) == pytest.approx(expected, rel=1e-5)
    assert "plugin.instruct.loss=chunked: T5ForConditionalGeneration can't" in printed[1]
    assert "plugin.instruct.loss=chunked: LlamaForCausalLM can't" in printed[2]


def test_proofs_hold_of_packed_rows(tmp_path: Path, data: list[str]) -> None:
    """What `ftcore check` proves: the export answers as the run did, and a step is the same in parts."""
    from ftcore.compose import compose
    from ftcore.proofs import export_proof, split_proof

    cfg = compose([*data, "model=tiny_llama", "hydra.run.dir=none"])
    proofs = [export_proof(cfg, tmp_path / "export"), split_proof(cfg, tmp_path / "split")]
    assert all(proof.ok for proof in proofs), proofs
