"""What every task's module holds."""

from typing import Any

import pytest

from ftcore.config import TASKS as NAMES
from ftcore.job import build_hooks
from ftcore.tasks import TASKS

PREDICTIONS: dict[str, dict[str, list[Any]]] = {
    "classify": {"label": [0, 1], "prediction": [0, 0], "scores": [[-0.1, -2.0], [-0.7, -0.7]]},
    "causal_lm": {"nll": [1.0], "tokens": [2]},
    "seq2seq": {"prediction": ["a"], "target": ["a"], "nll": [1.0], "tokens": [2]},
}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_a_task_declares_are_those_it_gives(name: str) -> None:
    """`METRICS`, which `task.metric` is checked against, is what `evaluate` returns; the default is one."""
    task = TASKS[name]
    assert sorted(task.METRICS) == sorted(task.evaluate(PREDICTIONS[name]))
    assert task.METRIC.lstrip("-") in task.METRICS


def test_config_and_tasks_name_the_same() -> None:
    """A task that the config takes is one that runs."""
    assert set(TASKS) == set(NAMES)


@pytest.mark.parametrize(("model", "task"), [("tiny_llama", "causal_lm"), ("tiny_t5", "seq2seq")])
def test_auto_is_what_the_model_does(config: Any, model: str, task: str) -> None:
    """`task=auto` trains an encoder-decoder on targets and a decoder on text; the config given stays."""
    cfg = config({"model.path": f"ftcore:{model}", "task.name": "auto"})
    assert build_hooks(cfg).cfg.task.name == task
    assert cfg.task.name == "auto"
