"""The hooks, in the order in which a run calls them.

A plugin implements any of them as a method marked `@hookimpl`, naming only the arguments it
wants. How answers combine:

* first result: one implementation answers; core's own answers where no plugin does. Two enabled
  plugins that both answer are an error. A wrapper (`@hookimpl(wrapper=True)`) may surround it.
* all: every plugin's answer counts, in registration order.
* notify: nothing is returned.

"Registration order" is the order of selection, changed only by `after` of `@plugin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ftcore.config import Config
    from ftcore.contract import Batch, Formatted, LossTerm, Sampler, Shard, State, Step
    from ftcore.store import Rows
    from ftcore.strategies import Strategy

hookspec = pluggy.HookspecMarker("ftcore")


@hookspec(firstresult=True)
def load_tokenizer(cfg: Config) -> Any:
    """Return the tokenizer (a transformers tokenizer). First result."""


@hookspec(firstresult=True)
def load_data(cfg: Config) -> dict[str, Any] | None:
    """Return the raw splits: `train`, and `validation` and `test` where there are any.

    First result. Each split is a `datasets.Dataset` (or `IterableDataset` when streaming), or any
    iterable of examples with a `fingerprint`: a string that differs where the examples do. It may have
    `remarks`, texts that are shown beside its number of rows (what was left out of it, and why).
    Core reads files and hub repositories. Called in every process of a run, and iterated only in one,
    where the formatted rows are not in the cache: so it reads as late as it can.
    """


@hookspec(firstresult=True)
def load_file(path: str, cfg: Config, split: str) -> Any:
    """Return the raw rows of a file that `ftcore predict` or `ftcore evaluate` was given.

    First result. What `load_data` returns for a split, whole and in order. `split` is `predict`, where rows
    may lack their label or target, or `test`. `path` may be a directory of files. Core reads it as
    `load_data` does: a plugin whose `load_data` reads files in a way of its own answers both.
    """


@hookspec(firstresult=True)
def format_examples(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    cfg: Config,
    labels: Sequence[str],
    split: str,
) -> Sequence[Formatted | Sequence[Formatted]]:
    """Turn raw examples into token rows; one entry per example.

    First result. An entry is one row, or a sequence of rows where an example becomes several (an empty
    one drops it, which the audit counts; a `Dropped(reason)` also says why). `labels` are the class
    names. `split` is `train`, `validation` or `test`, or `predict` where the examples are new and have
    no label or target: they are formatted as for `test`, with whatever stands in for the answer.

    The result is cached on disk: the key holds the plugin's name, version, options and source, so the
    answer must depend on nothing else. Under `data.workers` it is called in other processes, where what
    it keeps is lost.
    """


@hookspec(firstresult=True)
def build_strategy(cfg: Config) -> Strategy:
    """Return how ranks, devices and gradients are handled. First result."""


@hookspec(firstresult=True)
def load_model(cfg: Config, tokenizer: Any, labels: Sequence[str]) -> torch.nn.Module:
    """Return the pretrained model, fp32, on the CPU. First result."""


@hookspec
def setup_model(model: torch.nn.Module, cfg: Config, new: frozenset[str]) -> torch.nn.Module | None:
    """Change the model after its pretrained weights are loaded, before the strategy takes it.

    All, each getting what the one before returned; None leaves the model as it is. `new` names the
    parameters that the checkpoint did not have, drawn from the seed (a classification head).
    """


@hookspec
def param_options(name: str, param: torch.nn.Parameter) -> dict[str, float] | None:
    """Return `lr_scale` and/or `weight_decay` for one parameter. All; two different answers are an error."""


@hookspec(firstresult=True)
def build_optimizer(params: list[dict[str, Any]], cfg: Config) -> torch.optim.Optimizer:
    """Return the optimiser for groups of `params`, `lr`, `weight_decay` and `lr_scale`. First result."""


@hookspec(firstresult=True)
def build_sampler(rows: Rows, batch_size: int, seed: int, cfg: Config) -> Sampler:
    """Return what chooses the rows of each optimiser step. First result.

    `batch_size` counts rows per step over all ranks. Core shuffles, in length buckets.
    """


@hookspec
def on_train_start(state: State) -> None:
    """Before the first step, and after a checkpoint was loaded. Notify."""


@hookspec(firstresult=True)
def collate(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    rng: Callable[[int], np.random.Generator],
) -> Batch:
    """Pad rows to one micro-batch. First result.

    `rng(i)` is a generator for the i-th example that depends only on (seed, epoch, row).
    """


@hookspec
def count_units(batch: Batch) -> dict[str, float]:
    """Count this micro-batch's units, on the CPU, before any forward.

    All, merged; a repeated unit is an error.

    Core counts `examples`, `tokens` (trained tokens) and `micro_batches`.
    """


@hookspec
def on_step_start(model: torch.nn.Module, batches: Sequence[Batch], step: Step) -> None:
    """Before the first forward of a step, with all of this rank's micro-batches. Notify."""


@hookspec(firstresult=True)
def forward(model: torch.nn.Module, batch: Batch, step: Step) -> Any:
    """Call the model; returns its `ModelOutput`. First result."""


@hookspec(firstresult=True)
def compute_loss(model: torch.nn.Module, batch: Batch, outputs: Any, step: Step) -> dict[str, LossTerm]:
    """Return the loss terms by name; the main one is `task`. First result.

    Add a term, whatever the task's loss is, by a wrapper::

        @hookimpl(wrapper=True)
        def compute_loss(self, model, batch, outputs, step):
            terms = yield
            terms["mine"] = LossTerm(sum=..., unit="examples", weight=self.weight)
            return terms
    """


@hookspec
def on_backward_end(model: torch.nn.Module, step: Step) -> None:
    """After the last backward of a step, before gradients are summed over ranks. Notify.

    What was changed in the model for the forward passes is put back here: later hooks see the weights.
    """


@hookspec
def regularize(shards: Sequence[Shard], step: Step) -> dict[str, Tensor] | None:
    """Return scalar penalties on the weights, once per optimiser step, differentiable in `shard.value`.

    All, summed; a repeated name is an error. Every element of the weights is in exactly one
    rank's shards, so a sum over elements is right under any strategy.
    """


@hookspec
def on_gradients(shards: Sequence[Shard], lr: float, step: Step) -> None:
    """After the backward passes, before clipping: gradients are summed, normalised and unscaled.

    Notify; may write `grad` and `value` in place. A shard's own rate is `lr` times its `lr_scale`. Not
    called at a step that fp16's overflow skips.
    """


@hookspec
def on_step_end(state: State) -> None:
    """After the optimiser's step. Notify."""


@hookspec
def on_log(record: dict[str, Any]) -> None:
    """Before a record is written to metrics.jsonl; figures may be added to it. Notify, on rank 0 only."""


@hookspec
def should_stop(record: Mapping[str, Any], metric: str) -> str | None:
    """After an evaluation that is not the last: why the run should end here, or None to go on.

    All; one reason is enough. On rank 0 only; all ranks follow it. `record` has `step` and the metrics of
    this evaluation (`eval/accuracy`); `metric` is the one that picks the best weights, `-` before it where
    smaller is better (`accuracy`, `-nll`). The run ends as pruned: `result.json` gives the reason and the
    best metrics so far, the test data are not looked at, no model is exported, and the run is not made again.
    """


@hookspec(firstresult=True)
def eval_weights(shards: Sequence[Shard]) -> Mapping[str, Tensor] | None:
    """Return other values (1-D, by shard name) to evaluate and export with. First result."""


@hookspec(firstresult=True)
def predict(model: torch.nn.Module, batch: Batch, tokenizer: Any, cfg: Config) -> Mapping[str, Sequence[Any]]:
    """Return columns of predictions, one entry per row of the batch. First result."""


@hookspec
def evaluate(
    predictions: Mapping[str, Sequence[Any]], labels: Sequence[str], split: str
) -> dict[str, float] | None:
    """Return metrics from the predictions of a split, or of one group in it. All; a repeated key is an error.

    `predictions` has every column of `predict`, in row order, and the data's own non-tensor columns.
    """


@hookspec
def on_export(model: torch.nn.Module) -> torch.nn.Module | None:
    """Change the model before it is written to `model/`. All, passing it on."""


@hookspec
def on_train_end(state: State) -> None:
    """After the last step and the export. Notify."""


def names() -> Iterable[str]:
    """Every hook's name, in run order."""
    return [n for n, f in globals().items() if hasattr(f, "ftcore_spec")]
