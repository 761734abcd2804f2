"""The configuration: types, unknown keys, rules, and what makes two runs the same."""

import dataclasses
from typing import Any

import pytest

from ftcore import UserError
from ftcore.config import Config, HubData, TrainConfig, TrainerConfig, from_plain

FILES = {"data": {"source": "files", "train": "a.jsonl"}, "trainer": {"strategy": "single"}}


def plain(key: str, value: Any) -> dict[str, Any]:
    """A good config with one dotted key set."""
    *groups, name = key.split(".")
    node: dict[str, Any] = {k: dict(v) for k, v in FILES.items()}
    root = node
    for group in groups:
        node[group] = dict(node.get(group, {}))
        node = node[group]
    node[name] = value
    return root


def test_nested_dicts_become_dataclasses_with_defaults() -> None:
    """A saved config comes back equal, whatever it leaves out has its default."""
    cfg = from_plain(plain("data.columns.text", "body"))
    assert (cfg.data.columns.text, cfg.data.columns.label) == ("body", "label")
    assert cfg.train == TrainConfig()
    assert cfg.trainer == TrainerConfig()
    assert from_plain(dataclasses.asdict(cfg)) == cfg


def test_group_that_is_left_out_has_its_defaults() -> None:
    """A config without a trainer is trained by `single`."""
    assert from_plain({"data": FILES["data"]}).trainer == TrainerConfig()


def test_source_decides_the_datas_schema() -> None:
    """`hub` has its own keys; an unknown source names those there are."""
    cfg = from_plain(plain("data", {"source": "hub", "path": "org/name"}))
    assert isinstance(cfg.data, HubData)
    with pytest.raises(UserError, match=r"data\.source 'fils': did you mean 'files'\?"):
        from_plain(plain("data.source", "fils"))


def test_trainer_of_a_plugin_stays_a_dict() -> None:
    """Its options are the plugin's to check."""
    cfg = from_plain(plain("trainer", {"strategy": "deepspeed", "stage": 2}))
    assert cfg.trainer == {"strategy": "deepspeed", "stage": 2}


def test_plugins_keep_their_order_and_may_have_no_options() -> None:
    """The map's order is that of selection."""
    cfg = from_plain(plain("plugin", {"mixout": {"p": 0.5}, "a": None}))
    assert list(cfg.plugin.items()) == [("mixout", {"p": 0.5}), ("a", {})]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batchsize", 8, r"no config key 'train\.batchsize'; did you mean 'train\.batch_size'"),
        ("data.columns.txt", "x", r"no config key 'data\.columns\.txt'; did you mean 'data\.columns\.text'"),
        ("data.limit.trian", 5, r"no config key 'data\.limit\.trian'; did you mean 'data\.limit\.train'"),
        ("optim.lrr", 1, r"no config key 'optim\.lrr'; did you mean 'optim\.lr'"),
        ("sed", 1, r"no config key 'sed'; did you mean 'seed'"),
        ("train.batch_size", "many", r"train\.batch_size: wrong type: .*'many'"),
        ("train.batch_size", 1.5, r"train\.batch_size: wrong type: .*1\.5"),
        ("optim.lr", [1], r"optim\.lr: wrong type"),
        ("data.split", "half", r"data\.split: wrong type"),
        ("seed", "x", r"seed: wrong type"),
    ],
)
def test_unknown_key_or_wrong_type_is_named(key: str, value: Any, message: str) -> None:
    """The dotted key, and the nearest one or the value."""
    with pytest.raises(UserError, match=message) as caught:
        from_plain(plain(key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("train.batch_size", 0, "at least 1"),
        ("train.micro_batch_size", 17, r"at most train\.batch_size \(16\)"),
        ("train.steps", 0, "at least 1"),
        ("train.epochs", 0.0, "above 0"),
        ("train.epochs", float("nan"), "above 0"),
        ("train.keep_last", 0, "at least 1"),
        ("train.keep", "all", "'result' or 'resume'"),
        ("train.precision", "fp8", "one of"),
        ("train.max_grad_norm", 0.0, "above 0"),
        ("data.limit.test", 0, "at least 1"),
        ("data.max_length", 3, "at least 4"),
        ("data.max_dropped", 1.5, "a share, 0 to 1"),
        ("data.split", [0.5, 0.5], "three shares"),
        ("data.split", [0.8, 0.1, 0.2], "three shares"),
        ("data.split", [1.2, -0.1, -0.1], "three shares"),
        ("optim.lr", 0.0, "above 0"),
        ("optim.lr", float("nan"), "above 0"),
        ("optim.warmup", -1, "at least 0"),
        ("optim.betas", [0.9], "two numbers"),
        ("optim.betas", [0.9, 1.0], r"in \[0, 1\)"),
        ("optim.schedule", "cosin", "one of"),
        ("task.name", "classification", "one of"),
        ("task.label_smoothing", 1.0, r"in \[0, 1\)"),
        ("model.dropout", 1.0, r"in \[0, 1\) or null"),
        ("trainer.devices", 0, "at least 1"),
    ],
)
def test_value_out_of_range_names_key_rule_and_value(key: str, value: Any, must: str) -> None:
    """What no run can work with is refused before anything loads."""
    with pytest.raises(UserError, match=f"{key}.* must be .*{must}.*, got ") as caught:
        from_plain(plain(key, value))
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.max_grad_norm", None),
        ("train.micro_batch_size", 16),
        ("data.split", [0.7, 0.2, 0.1]),
        ("data.split", [1, 0, 0]),
        ("model.dropout", 0),
        ("optim.lr", "1e-4"),
    ],
)
def test_values_at_the_edge_are_taken(key: str, value: Any) -> None:
    """Whole numbers for fractions, text of a number, null where it means something."""
    from_plain(plain(key, value))


def test_several_devices_need_ddp() -> None:
    """`single` on two devices says what to write instead."""
    with pytest.raises(UserError, match=r"one device, got trainer\.devices=2; use trainer=ddp"):
        from_plain(plain("trainer", {"strategy": "single", "devices": 2}))


def test_identity_leaves_out_how_a_run_is_started_and_kept() -> None:
    """Name, force, logging and keeping are no part of it; seed, data and plugins are."""
    base = from_plain(FILES).identity()
    for key in (
        "name",
        "force",
        "offline",
        "train.resume",
        "train.keep",
        "train.keep_last",
        "train.log_every",
    ):
        value = {"name": "x", "train.keep": "resume", "train.resume": False}.get(key, 1)
        assert from_plain(plain(key, value)).identity() == base, key
    for key, value in (("seed", 1), ("data.train", "b"), ("plugin", {"a": {}}), ("train.batch_size", 8)):
        assert from_plain(plain(key, value)).identity() != base, key


@pytest.mark.parametrize(
    ("train", "per_epoch", "steps"),
    [({"epochs": 2}, 10, 20), ({"epochs": 0.25}, 10, 3), ({"epochs": 0.01}, 10, 1), ({"steps": 7}, 10, 7)],
)
def test_steps_of_a_run(train: dict[str, Any], per_epoch: int, steps: int) -> None:
    """Epochs may be fractions, never less than a step; `steps` wins."""
    assert Config(train=TrainConfig(**train)).total_steps(per_epoch) == steps


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16, 40])
def test_default_micro_batch_takes_the_batch_in_one_pass(world: int) -> None:
    """However many ranks share 16 rows, the default needs one forward on each, with none too large."""
    size = Config(train=TrainConfig(batch_size=16)).micro_batch_size(world)
    assert size * world >= 16
    assert (size - 1) * world < 16
    assert Config(train=TrainConfig(batch_size=16, micro_batch_size=4)).micro_batch_size(world) == 4
