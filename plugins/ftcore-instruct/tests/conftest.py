"""What the tests share: tokenizers of model families, and the plugin's data hooks."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "chatml": (None, "<|im_end|>", ("<|im_start|>",)),
    "qwen": (None, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": (None, "<|im_end|>", ("<|im_start|>",)),
    "marked": (None, "<|im_end|>", ("<|im_start|>",)),
    "mistral": ("<s>", "</s>", ()),
    "gemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": ("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>")),
}
"""Of each family: the start token, the end token, and its other control tokens."""
ADDED = {"qwen": ["<tool_call>", "</tool_call>"], "qwen3": ["<think>", "</think>"]}


@pytest.fixture(scope="session")
def family() -> Callable[[str], Any]:
    """`family("llama3")`: a byte tokenizer with the control tokens and the chat template of a family."""
    from ftcore import tiny

    def make(name: str) -> Any:
        tokenizer = tiny.tokenizer("tiny_llama")
        bos, eos, others = FAMILIES[name]
        tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
        tokenizer.add_special_tokens({"additional_special_tokens": list(others)})
        tokenizer.add_tokens(ADDED.get(name, []))
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Sequence[Any]], Path]:
    """`write("a.jsonl", rows)`: the file, as JSON lines."""

    def make(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return make


@pytest.fixture
def opened() -> Callable[..., Any]:
    """`opened({"data.train": path}, cap=3)`: (plugin, prepared data, config) of the plugin's data hooks."""
    from ftcore.config import from_plain
    from ftcore.defaults import Defaults
    from ftcore.hooks import Hooks
    from ftcore.plugins import Enabled
    from ftcore.prepare import prepare
    from ftcore_instruct import Instruct

    def make(overrides: Mapping[str, Any], **options: Any) -> Any:
        plain: dict[str, Any] = {"trainer": {"strategy": "single", "device": "cpu"}}
        given = {"model.path": "ftcore:tiny_llama", "data.source": "files", "task.name": "causal_lm"}
        given |= {"train.epochs": 1, "data.max_length": 512}
        for key, value in {**given, **overrides}.items():
            *groups, name = key.split(".")
            node = plain
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = str(value) if isinstance(value, Path) else value
        cfg = from_plain(plain)
        plugin = Instruct(**{"pack": False, "overlap": "off", **options})
        one = Enabled(name="instruct", instance=plugin, distribution="", version="0", options=options)
        hooks = Hooks(Defaults(cfg), [one], cfg)
        return plugin, prepare(hooks, hooks.load_tokenizer()), hooks

    return make
