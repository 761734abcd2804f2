"""Typed calls of the hooks: one method per hook, which says how answers combine.

The loop never touches pluggy itself.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pluggy

from ftcore import hookspecs
from ftcore.contract import Batch, LossTerm, Sampler, Shard, State, Step
from ftcore.errors import UserError
from ftcore.plugins import Enabled, source_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ftcore.config import Config
    from ftcore.store import Rows
    from ftcore.strategies import Strategy

__all__ = ["Hooks"]

CHAINED = ("setup_model", "on_export")


def _check_marked(plugin: Enabled) -> None:
    """Refuse a method that has a hook's name but is none: it would never be called."""
    for name in hookspecs.names():
        method = getattr(plugin.instance, name, None)
        if callable(method) and not hasattr(method, "ftcore_impl"):
            raise UserError(f"plugin '{plugin.name}': its {name} is never called; put @hookimpl above it")


class _Wrapper:
    """A wrapper's generator: the time in it is added up, and loss terms that pass it are looked after."""

    __slots__ = ("_generator", "_hook", "_plugin", "_spent")

    def __init__(self, generator: Any, plugin: str, hook: str, spent: dict[str, float]) -> None:
        self._generator, self._plugin, self._hook, self._spent = generator, plugin, hook, spent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)  # throw, close

    def __next__(self) -> Any:
        start = perf_counter()
        try:
            return next(self._generator)
        finally:
            self._spent[self._hook] += perf_counter() - start

    def send(self, value: Any) -> Any:
        is_loss = self._hook == "compute_loss" and isinstance(value, dict)
        before = [(n, t, getattr(t, "sum", None)) for n, t in value.items()] if is_loss else ()
        start = perf_counter()
        try:
            return self._generator.send(value)
        except StopIteration as stop:
            for name, term, total in before if isinstance(stop.value, dict) else ():
                if (after := stop.value.get(name)) is not term:
                    _check_kept(self._plugin, name, total, after)
            raise
        finally:
            self._spent[self._hook] += perf_counter() - start


def _check_kept(plugin: str, name: str, total: Tensor | None, after: LossTerm | None) -> None:
    """Refuse to lose a loss term that others gave: dropped, or another put under its name."""
    if after is None:
        raise UserError(f"plugin '{plugin}' drops the loss term '{name}'; set its weight to 0 instead")
    if getattr(after, "sum", None) is not total:
        raise UserError(
            f"plugin '{plugin}' puts another loss term under the name '{name}', which is taken; choose"
            " another name (a compute_loss that is no wrapper replaces the task's loss)"
        )


class Hooks:
    """The enabled plugins of one run, and core's defaults beneath them."""

    def __init__(self, defaults: Any, plugins: Sequence[Enabled], cfg: Config) -> None:
        self.plugins = list(plugins)
        self.cfg = cfg
        self._pm = pluggy.PluginManager("ftcore")
        self._pm.add_hookspecs(hookspecs)
        self._pm.register(defaults, "core")
        for one in plugins:
            _check_marked(one)
            try:
                self._pm.register(one.instance, one.name)
            except pluggy.PluginValidationError as error:
                raise UserError(f"plugin '{one.name}': {str(error).splitlines()[-1]}") from error
        try:
            self._pm.check_pending()
        except pluggy.PluginValidationError as error:
            raise UserError(f"a hook this ftcore does not have: {error}; upgrade ftcore") from error
        self._check_single_answers()
        self.hook = self._pm.hook
        self.seconds: dict[str, dict[str, float]] = {p.name: defaultdict(float) for p in plugins}
        for name in hookspecs.names():
            for impl in getattr(self.hook, name).get_hookimpls():
                if impl.plugin_name in self.seconds:
                    impl.function = self._measured(name, impl)

    def _measured(self, hook: str, impl: pluggy.HookImpl) -> Callable[..., Any]:
        """A plugin's function, which adds the time it takes to `seconds[plugin][hook]` (the host's time)."""
        spent, function = self.seconds[impl.plugin_name], impl.function

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _Wrapper(function(*args, **kwargs), impl.plugin_name, hook, spent)

        @functools.wraps(function)
        def plain(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[hook] += perf_counter() - start

        return wrapper if impl.wrapper else plain

    def implemented(self, name: str) -> list[str]:
        """Names of the plugins (and `core`) that implement a hook, in registration order, wrappers last."""
        return [i.plugin_name for i in getattr(self.hook, name).get_hookimpls()]

    def implementations(self, name: str) -> list[tuple[str, bool]]:
        """(plugin, is a wrapper) in the order in which a call enters them: outermost first."""
        impls = getattr(self.hook, name).get_hookimpls()
        return [(i.plugin_name, i.wrapper or i.hookwrapper) for i in reversed(impls)]

    def sources(self, name: str) -> list[tuple[str, str]]:
        """(plugin, hash of its source file) of every implementation of a hook, in registration order."""
        impls = getattr(self.hook, name).get_hookimpls()
        return [(i.plugin_name, source_hash(i.function)) for i in impls]

    def _check_single_answers(self) -> None:
        for name in hookspecs.names():
            caller = getattr(self._pm.hook, name)
            wrappers = [i.plugin_name for i in caller.get_hookimpls() if i.wrapper or i.hookwrapper]
            if name in CHAINED and wrappers:
                raise UserError(
                    f"plugin '{wrappers[0]}' wraps {name}, which is passed on and can't be wrapped"
                )
            if not (caller.spec and caller.spec.opts.get("firstresult")):
                continue
            answers = [
                i.plugin_name
                for i in caller.get_hookimpls()
                if not (i.wrapper or i.hookwrapper) and i.plugin_name != "core"
            ]
            if len(answers) > 1:
                raise UserError(
                    f"plugins {' and '.join(repr(a) for a in answers)} both replace {name};"
                    " choose one of them"
                )

    def _chain(self, name: str, value: Any, **kwargs: Any) -> Any:
        """Pass `value` (the first argument) through every implementation, in registration order."""
        caller = getattr(self.hook, name)
        key = caller.spec.argnames[0]
        for impl in caller.get_hookimpls():
            arguments = {key: value, **kwargs}
            result = impl.function(*(arguments[a] for a in impl.argnames))
            value = value if result is None else result
        return value

    def _merge(self, name: str, **kwargs: Any) -> dict[str, Any]:
        """All answers in one dict; a key that two plugins give is an error that names it."""
        merged: dict[str, Any] = {}
        for answer in reversed(getattr(self.hook, name)(**kwargs)):
            for key, value in answer.items():
                if key in merged:
                    raise UserError(f"two plugins answer '{key}' in {name}: {self.implemented(name)}")
                merged[key] = value
        return merged

    # Data.

    def load_data(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.hook.load_data(cfg=self.cfg)
        return answer

    def load_file(self, path: str, split: str) -> Any:
        return self.hook.load_file(path=path, cfg=self.cfg, split=split)

    def load_tokenizer(self) -> Any:
        return self.hook.load_tokenizer(cfg=self.cfg)

    def format_examples(
        self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, labels: Sequence[str], split: str
    ) -> Sequence[Any]:
        answer: Sequence[Any] = self.hook.format_examples(
            examples=examples, tokenizer=tokenizer, cfg=self.cfg, labels=labels, split=split
        )
        if len(answer) != len(examples):
            raise UserError(
                f"format_examples of {self.implemented('format_examples')[-1]} returned"
                f" {len(answer)} entries for {len(examples)} examples; it must return one per example"
            )
        return answer

    def build_sampler(self, rows: Rows, batch_size: int, seed: int) -> Sampler:
        answer: Sampler = self.hook.build_sampler(rows=rows, batch_size=batch_size, seed=seed, cfg=self.cfg)
        return answer

    def collate(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, rng: Any) -> Batch:
        answer: Batch = self.hook.collate(examples=examples, tokenizer=tokenizer, rng=rng)
        return answer

    # Model and optimiser.

    def load_model(self, tokenizer: Any, labels: Sequence[str]) -> tuple[torch.nn.Module, dict[str, Tensor]]:
        """The model as plugins made it, and flat copies of what was loaded where a plugin needs them."""
        model = self.hook.load_model(cfg=self.cfg, tokenizer=tokenizer, labels=labels)
        new: frozenset[str] = getattr(model, "ftcore_new", frozenset())
        pretrained = {}
        if any("pretrained" in p.meta.needs for p in self.plugins):
            old = ((n, p) for n, p in model.named_parameters() if n not in new)
            pretrained = {n: p.detach().clone().view(-1) for n, p in old}
        return self._chain("setup_model", model, cfg=self.cfg, new=new), pretrained

    def load_exported(self, tokenizer: Any, labels: Sequence[str]) -> torch.nn.Module:
        """A trained model from `model/`: whatever `setup_model` did is in it, or was for training alone."""
        model: torch.nn.Module = self.hook.load_model(cfg=self.cfg, tokenizer=tokenizer, labels=labels)
        return model

    def param_options(self, name: str, param: torch.nn.Parameter) -> dict[str, float]:
        merged: dict[str, float] = {}
        for answer in self.hook.param_options(name=name, param=param):
            for key, value in answer.items():
                if key not in ("lr_scale", "weight_decay"):
                    raise UserError(f"param_options: '{key}' is neither lr_scale nor weight_decay")
                if merged.setdefault(key, value) != value:
                    raise UserError(
                        f"two plugins give {name} a different {key}: {self.implemented('param_options')}"
                    )
        return merged

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        answer: torch.optim.Optimizer = self.hook.build_optimizer(params=params, cfg=self.cfg)
        return answer

    def build_strategy(self) -> Strategy:
        answer: Strategy = self.hook.build_strategy(cfg=self.cfg)
        return answer

    # One step.

    def on_train_start(self, state: State) -> None:
        self.hook.on_train_start(state=state)

    def count_units(self, batch: Batch) -> dict[str, float]:
        return self._merge("count_units", batch=batch)

    def on_step_start(self, model: torch.nn.Module, batches: Sequence[Batch], step: Step) -> None:
        self.hook.on_step_start(model=model, batches=batches, step=step)

    def forward(self, model: torch.nn.Module, batch: Batch, step: Step) -> Any:
        return self.hook.forward(model=model, batch=batch, step=step)

    def compute_loss(
        self, model: torch.nn.Module, batch: Batch, outputs: Any, step: Step
    ) -> dict[str, LossTerm]:
        terms = self.hook.compute_loss(model=model, batch=batch, outputs=outputs, step=step)
        if not isinstance(terms, dict) or "task" not in terms:
            raise UserError(
                "compute_loss must return a dict of LossTerm with the main term under 'task'"
                f" (implementations: {self.implemented('compute_loss')})"
            )
        for name, term in terms.items():
            if not isinstance(term, LossTerm) or getattr(term.sum, "ndim", None) != 0:
                raise UserError(f"loss term '{name}' must be a LossTerm whose sum is a scalar tensor")
            if batch and term.sum.device != batch["input_ids"].device:
                raise UserError(
                    f"loss term '{name}' is on {term.sum.device}, the batch on {batch['input_ids'].device};"
                    " make its tensors there"
                )
            if term.sum.dtype.itemsize < 4:
                raise UserError(
                    f"loss term '{name}' is summed in {term.sum.dtype}: add up in fp32 (.float())"
                )
        return terms

    def on_backward_end(self, model: torch.nn.Module, step: Step) -> None:
        self.hook.on_backward_end(model=model, step=step)

    def regularize(self, shards: Sequence[Shard], step: Step) -> dict[str, Tensor]:
        return self._merge("regularize", shards=shards, step=step)

    def on_gradients(self, shards: Sequence[Shard], lr: float, step: Step) -> None:
        self.hook.on_gradients(shards=shards, lr=lr, step=step)

    def on_step_end(self, state: State) -> None:
        self.hook.on_step_end(state=state)

    def on_log(self, record: dict[str, Any]) -> None:
        self.hook.on_log(record=record)

    # Evaluation and the end.

    def should_stop(self, record: Mapping[str, Any], metric: str) -> str:
        """The plugins' reasons, one after another; empty where none has any."""
        return "; ".join(reversed(self.hook.should_stop(record=record, metric=metric)))

    def eval_weights(self, shards: Sequence[Shard]) -> Mapping[str, Tensor] | None:
        answer: Mapping[str, Tensor] | None = self.hook.eval_weights(shards=shards)
        return answer

    def predict(self, model: torch.nn.Module, batch: Batch, tokenizer: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.hook.predict(
            model=model, batch=batch, tokenizer=tokenizer, cfg=self.cfg
        )
        return answer

    def evaluate(
        self, predictions: Mapping[str, Sequence[Any]], labels: Sequence[str], split: str
    ) -> dict[str, float]:
        return self._merge("evaluate", predictions=predictions, labels=labels, split=split)

    def on_export(self, model: torch.nn.Module) -> torch.nn.Module:
        answer: torch.nn.Module = self._chain("on_export", model)
        return answer

    def on_train_end(self, state: State) -> None:
        self.hook.on_train_end(state=state)
