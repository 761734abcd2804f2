"""Models: dropout that is really off, new tokens, heads drawn from the seed, and what can't be loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftcore import UserError, tiny
from ftcore.collate import pad
from ftcore.config import Config, ModelConfig, TaskConfig
from ftcore.models import check_positions, load_model, load_tokenizer, locate, origin, set_dropout
from ftcore.seeding import seed_global
from ftcore.tasks import TASKS

TASK = {"tiny_bert": "classify", "tiny_llama": "causal_lm", "tiny_t5": "seq2seq"}


def load(path: str, task: str, seed: int = 0, **options: Any) -> Any:
    """A model with its task's head."""
    cfg = Config(model=ModelConfig(path=path, **options), task=TaskConfig(name=task), seed=seed, offline=True)
    labels = ["a", "b", "c"] if task == "classify" else []
    return load_model(cfg, load_tokenizer(cfg), labels, TASKS[task].AUTO_MODEL)


def training_logits(model: Any, seed: int) -> torch.Tensor:
    """Logits of a fixed input in training mode, dropout drawn from `seed`."""
    seed_global(torch.device("cpu"), seed)
    ids = torch.arange(4, 36).view(2, 16)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    logits: torch.Tensor = model.train()(input_ids=ids, **more).logits.detach()
    return logits


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    """`saved("tiny_bert")`: a directory with a pretrained body (an untied language model for Llama)."""

    def make(name: str) -> str:
        import transformers

        config = tiny.config(name)
        config.tie_word_embeddings = False
        seed_global(torch.device("cpu"), 77)
        auto = transformers.AutoModelForCausalLM if name == "tiny_llama" else transformers.AutoModel
        auto.from_config(config).save_pretrained(tmp_path / name)
        tiny.tokenizer(name).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize("configured", [None, 5])
def test_tokenizer_without_a_pad_token_classifies_as_without_padding(
    saved: Any, configured: int | None
) -> None:
    """Padded with another token, each row of a batch has the logits that it has alone."""
    path = Path(saved("tiny_llama"))
    for name, change in (
        ("tokenizer_config.json", {"pad_token": None}),
        ("config.json", {"pad_token_id": configured}),
    ):
        content = json.loads((path / name).read_text()) | change
        (path / name).write_text(json.dumps(content))
    cfg = Config(model=ModelConfig(path=str(path)), offline=True)
    tokenizer, model = load_tokenizer(cfg), load(str(path), "classify").eval()
    assert tokenizer.pad_token == tokenizer.eos_token
    texts = ["ab", "a longer text", "x"]
    rows = [{"input_ids": np.array(tokenizer(text)["input_ids"]), "labels": 0} for text in texts]
    batch = pad(rows, tokenizer.pad_token_id, tokenizer.padding_side)
    del batch["labels"]
    together = model(**batch).logits
    alone = torch.cat([model(input_ids=torch.tensor(row["input_ids"])[None]).logits for row in rows])
    torch.testing.assert_close(together, alone)


def test_tokenizer_with_nothing_to_pad_with_is_an_error(saved: Any) -> None:
    """The file and the key that mend it are named."""
    path = Path(saved("tiny_llama"))
    content = json.loads((path / "tokenizer_config.json").read_text())
    content |= dict.fromkeys(("pad_token", "eos_token", "unk_token", "bos_token"))
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no token to pad with .*tokenizer_config\.json"):
        load_tokenizer(Config(model=ModelConfig(path=str(path)), offline=True))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_dropout_is_set_everywhere(name: str) -> None:
    """At 0 two training passes are equal; at 0.5 they are not."""
    off, on = (load(f"ftcore:{name}", TASK[name], dropout=p) for p in (0.0, 0.5))
    assert torch.equal(training_logits(off, 1), training_logits(off, 2))
    assert not torch.equal(training_logits(on, 1), training_logits(on, 2))


def test_dropout_of_none_leaves_the_models_own() -> None:
    """Without `model.dropout` each stays as its family has it."""
    model = load("ftcore:tiny_bert", "classify")
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_layer_dropout_is_only_ever_turned_off() -> None:
    """Skipping whole layers is another thing: 0 turns it off, other values leave it; configs nest."""
    import transformers

    config = transformers.BartConfig(encoder_layerdrop=0.2, dropout=0.1, classifier_dropout=0.0)
    set_dropout(config, 0.3)
    assert (config.encoder_layerdrop, config.dropout, config.classifier_dropout) == (0.2, 0.3, 0.3)
    set_dropout(config, 0.0)
    assert (config.encoder_layerdrop, config.dropout, config.attention_dropout) == (0.0, 0.0, 0.0)


def test_tiny_weights_are_pretrained_and_the_head_is_drawn_from_the_seed() -> None:
    """Another seed changes the classification head and nothing else; the same seed, nothing."""
    first, again, other = (load("ftcore:tiny_bert", "classify", seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"classifier.weight"}
    llamas = [load("ftcore:tiny_llama", "causal_lm", seed=s).state_dict() for s in (0, 1)]
    assert all(torch.equal(llamas[0][name], llamas[1][name]) for name in llamas[0])


def test_pretrained_directory_keeps_its_body_and_gets_a_head(saved: Any) -> None:
    """From files: fp32, the body as saved, a head for the labels, drawn from the seed."""
    path = saved("tiny_bert")
    first, other = (load(path, "classify", seed=s) for s in (0, 1))
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    a, b = first.state_dict(), other.state_dict()
    differing = {name for name in a if not torch.equal(a[name], b[name])}
    assert differing == {"classifier.weight"}
    cfg = Config(model=ModelConfig(path=path))
    assert len(origin(cfg, first)["sha256"]) == 64


@pytest.mark.parametrize("tied", [True, False])
def test_new_token_starts_as_the_mean_of_its_pieces(saved: Any, tmp_path: Path, tied: bool) -> None:
    """Input and output rows of a new token are means of the old ones; a tie stays a tie; old rows stay."""
    (tmp_path / "tokens.txt").write_text("abc\n\nzq\n", encoding="utf-8")
    path = "ftcore:tiny_llama" if tied else saved("tiny_llama")
    options = {"add_tokens": str(tmp_path / "tokens.txt")}
    before, after = load(path, "causal_lm"), load(path, "causal_lm", **options)
    grown = load_tokenizer(Config(model=ModelConfig(path=path, **options)))
    token = grown.convert_tokens_to_ids("abc")
    assert grown("xabc", add_special_tokens=False)["input_ids"][-1] == token
    pieces = load_tokenizer(Config(model=ModelConfig(path=path)))("abc", add_special_tokens=False)[
        "input_ids"
    ]
    assert len(pieces) == 3
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, layer)().weight, getattr(after, layer)().weight
        torch.testing.assert_close(new[token], old[pieces].mean(dim=0))
        assert torch.equal(new[: len(old)], old)
        assert len(new) == len(old) + 2
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("name", "task", "needs"),
    [
        ("tiny_bert", "causal_lm", "a decoder"),
        ("tiny_bert", "seq2seq", "an encoder-decoder"),
        ("tiny_llama", "seq2seq", "an encoder-decoder"),
        ("tiny_t5", "causal_lm", "a decoder"),
    ],
)
def test_model_that_cannot_do_the_task_is_refused(name: str, task: str, needs: str) -> None:
    """The error names the model's family, the task, and what the task needs."""
    family = name.removeprefix("tiny_")
    with pytest.raises(
        UserError, match=f"is a {family} model, which can't do task={task}; that needs {needs}"
    ):
        load(f"ftcore:{name}", task)


def test_classifier_of_every_family_loads_and_pads() -> None:
    """Encoders, decoders and T5 all classify; a decoder knows its padding token."""
    for name in tiny.NAMES:
        model = load(f"ftcore:{name}", "classify")
        ids = torch.tensor([[5, 6, tiny.EOS], [7, tiny.EOS, tiny.PAD]])
        assert model.eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json, so it is no model directory"),
        (["config.json"], r"has no weights \(\*\.safetensors\)$"),
        (["config.json", "pytorch_model.bin"], r"has no weights .*only pickled weights, which are not read"),
    ],
)
def test_directory_without_readable_weights_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    """What is missing in the directory is named; pickles are never read."""
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        locate(ModelConfig(path=str(tmp_path)))


def test_path_that_names_nothing_is_refused(tmp_path: Path) -> None:
    """No path, a missing directory, a misspelt model of ftcore's."""
    with pytest.raises(UserError, match=r"model\.path is not set"):
        locate(ModelConfig())
    with pytest.raises(UserError, match="no such directory"):
        locate(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"ftcore:tiny_bret: did you mean 'tiny_bert'"):
        load("ftcore:tiny_bret", "classify")


def test_weights_that_do_not_load_are_one_line(saved: Any) -> None:
    """A damaged or truncated weights file is the user's error, not a traceback."""
    weights = Path(saved("tiny_bert")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.path=.* does not load: "):
        load(str(weights.parent), "classify")


def test_gguf_file_is_read_by_its_folder_and_name(tmp_path: Path) -> None:
    """A `.gguf` path is found as a file; without the package that carries it, smollm2 is a hub id."""
    file = tmp_path / "tiny.gguf"
    with pytest.raises(UserError, match="no such directory"):
        locate(ModelConfig(path=str(file)))
    file.write_bytes(b"GGUF")
    assert locate(ModelConfig(path=str(file))) == str(file)
    assert locate(ModelConfig(path="ftcore:smollm2")).endswith((".gguf", "SmolLM2-135M-Instruct"))
    with pytest.raises(UserError, match=r"tiny\.gguf: "):
        load(str(file), "causal_lm")


@pytest.mark.parametrize("classes", [["a", "b", "d"], ["a", "b"]])
def test_head_for_other_classes_is_drawn_anew(tmp_path: Path, classes: list[str]) -> None:
    """As many classes or others: the trained head knows nothing of them. The body stays."""
    model = load("ftcore:tiny_bert", "classify")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    tiny.tokenizer("tiny_bert").save_pretrained(tmp_path)
    cfg = Config(model=ModelConfig(path=str(tmp_path)), task=TaskConfig(name="classify"), seed=1)
    old, new = (
        load_model(cfg, load_tokenizer(cfg), labels, TASKS["classify"].AUTO_MODEL)
        for labels in (["a", "b", "c"], classes)
    )
    assert old.ftcore_new == frozenset()
    assert new.ftcore_new == {"classifier.weight", "classifier.bias"}
    assert old.classifier.weight.equal(model.classifier.weight)
    assert not new.classifier.weight[:2].equal(model.classifier.weight[:2])
    for (name, a), (_, b) in zip(old.bert.named_parameters(), new.bert.named_parameters(), strict=True):
        assert a.equal(b), name


def test_rows_longer_than_learned_positions_are_refused() -> None:
    """Where positions are computed (Llama), there is no such end."""
    model = load("ftcore:tiny_bert", "classify")
    most = model.config.max_position_embeddings
    check_positions(model, {"train": most})
    with pytest.raises(UserError, match=rf"{most + 1} tokens, but the model has {most} positions"):
        check_positions(model, {"train": most, "test": most + 1})
    check_positions(load("ftcore:tiny_llama", "causal_lm"), {"train": 10**6})


SAVE = """
import sys, transformers
from ftcore import models, tiny
model = transformers.AutoModelForCausalLM.from_config(tiny.config("tiny_llama"))
models.save(model, sys.argv[1])
print("deepspeed" in sys.modules)
"""


def test_saving_does_not_import_deepspeed(tmp_path: Path) -> None:
    """transformers would, to ask whether it wraps the model: seconds, and a warning."""
    ended = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"
    assert (tmp_path / "model.safetensors").is_file()
