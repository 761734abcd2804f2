"""The list of hooks and of their arguments: what every plugin is written against."""

import inspect

from ftcore import hookspecs
from ftcore.hooks import Hooks

HOOKS = {
    "load_tokenizer": ["cfg"],
    "load_data": ["cfg"],
    "load_file": ["path", "cfg", "split"],
    "format_examples": ["examples", "tokenizer", "cfg", "labels", "split"],
    "build_strategy": ["cfg"],
    "load_model": ["cfg", "tokenizer", "labels"],
    "setup_model": ["model", "cfg", "new"],
    "param_options": ["name", "param"],
    "build_optimizer": ["params", "cfg"],
    "build_sampler": ["rows", "batch_size", "seed", "cfg"],
    "on_train_start": ["state"],
    "collate": ["examples", "tokenizer", "rng"],
    "count_units": ["batch"],
    "on_step_start": ["model", "batches", "step"],
    "forward": ["model", "batch", "step"],
    "compute_loss": ["model", "batch", "outputs", "step"],
    "on_backward_end": ["model", "step"],
    "regularize": ["shards", "step"],
    "on_gradients": ["shards", "lr", "step"],
    "on_step_end": ["state"],
    "on_log": ["record"],
    "should_stop": ["record", "metric"],
    "eval_weights": ["shards"],
    "predict": ["model", "batch", "tokenizer", "cfg"],
    "evaluate": ["predictions", "labels", "split"],
    "on_export": ["model"],
    "on_train_end": ["state"],
}
"""The interface that plugins are written against: whoever changes it changes `ftcore.plugins.API`."""


def test_hooks_and_their_arguments_are_pinned() -> None:
    """Names, order and arguments of every hook are as plugins know them."""
    found = {n: list(inspect.signature(getattr(hookspecs, n)).parameters) for n in hookspecs.names()}
    assert found == HOOKS
    assert list(found) == list(HOOKS)


def test_every_hook_has_a_typed_call() -> None:
    """`Hooks` has a method for each; `setup_model` is part of `load_model`."""
    assert {n for n in HOOKS if not hasattr(Hooks, n)} == {"setup_model"}
    assert all(callable(getattr(Hooks, n)) for n in HOOKS if n != "setup_model")


def test_every_hook_says_how_its_answers_combine() -> None:
    """Each docstring, from which the reference is made, names its rule, and the specification agrees."""
    for name in hookspecs.names():
        spec = getattr(hookspecs, name)
        text = inspect.getdoc(spec) or ""
        assert ("First result" in text) == bool(spec.ftcore_spec["firstresult"]), name
        assert any(rule in text for rule in ("First result", "All", "Notify")), name
