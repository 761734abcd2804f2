"""The tasks core knows. Each is a module with the functions of `Task`."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ftcore.config import Config
from ftcore.contract import Batch, Formatted, LossTerm
from ftcore.tasks import causal_lm, classify, seq2seq

__all__ = ["TASKS", "Task"]


class Task(Protocol):
    """What a task's module holds."""

    METRIC: str
    """Of evaluation, picks the best weights; `-` before it where smaller is better."""

    METRICS: tuple[str, ...]
    """All that `evaluate` gives."""

    ANSWERS: tuple[str, ...]
    """Columns of `predict` that speak of the row's own label or target: none where it is not known."""

    AUTO_MODEL: str
    """The transformers class that loads a model for it."""

    def format_examples(
        self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, labels: Sequence[str]
    ) -> list[Formatted | Sequence[Formatted]]: ...

    def count_tokens(self, batch: Batch) -> int: ...

    def loss(self, batch: Batch, outputs: Any, cfg: Config) -> LossTerm: ...

    def predict(self, model: Any, batch: Batch, tokenizer: Any, cfg: Config) -> dict[str, Sequence[Any]]: ...

    def evaluate(self, predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]: ...


TASKS: dict[str, Task] = {"classify": classify, "causal_lm": causal_lm, "seq2seq": seq2seq}
