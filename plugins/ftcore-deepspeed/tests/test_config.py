"""The engine's JSON: what is derived, what a user's file may say, and what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore import UserError
from ftcore.config import Config, FilesData, TrainConfig
from ftcore_deepspeed import DeepSpeed
from ftcore_deepspeed._config import accepted, check_known, derive

CFG = Config(
    data=FilesData(),
    train=TrainConfig(batch_size=16, micro_batch_size=4, precision="bf16", max_grad_norm=1.0),
)


def derived(tmp_path: Path, given: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """`derive` for two ranks with this file."""
    path = tmp_path / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return derive(CFG, DeepSpeed(config=str(path), **options), 2)


def test_the_engine_neither_accumulates_nor_clips_nor_casts() -> None:
    """Core does all three; the stage and the offloading are the options'."""
    engine, passed = derive(CFG, DeepSpeed(stage=3, offload_optimizer=True), 2)
    assert engine["gradient_accumulation_steps"] == 1
    assert engine["gradient_clipping"] == 0
    assert engine["zero_optimization"]["stage"] == 3
    assert engine["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & engine.keys()
    assert passed == []


def test_a_file_that_agrees_is_taken_and_its_other_keys_go_to_the_engine(tmp_path: Path) -> None:
    """Whatever types its numbers are written in; "auto" agrees with all."""
    given = {
        "train_batch_size": "16",
        "gradient_accumulation_steps": 2.0,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "true"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "2e-5", "betas": [0.9, 0.999], "eps": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": False,
    }
    engine, passed = derived(tmp_path, given)
    assert passed == [
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "wall_clock_breakdown",
    ]
    assert engine["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
        "compute_grad_norm": False,
    }
    assert engine["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but train.batch_size is 16"),
        ({"train_micro_batch_size_per_gpu": 8}, "is 8, but train.micro_batch_size is 4"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, but .* is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but train.precision=bf16, so it is True"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "lr is 0.001, but optim.lr is 2e-05"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is Lion, but ftcore's optimiser is AdamW"),
        ({"optimizer": {"params": {"adam_w_mode": True}}}, "adam_w_mode would do nothing"),
        (
            {"bf16": {"enabled": True, "immediate_grad_update": True}},
            "immediate_grad_update would do nothing",
        ),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, but trainer.stage is 2"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "device is cpu, but trainer.offload_optimizer=False, so it is none",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type can't be set: the schedule is optim.schedule"),
        ({"torch_autocast": {"lower_precision_safe_modules": ["os.x"]}}, "can't be set: train.precision"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "round_robin_gradients can't be set: ftcore could not tell whose a slice is",
        ),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size can't be set"),
        ("{", "can't be read as JSON"),
        ([1], "must hold a JSON object, not a list"),
    ],
)
def test_a_file_that_contradicts_is_refused_with_both_values(
    tmp_path: Path, given: Any, message: str
) -> None:
    """With the file, the key, its value, and what ftcore's config says."""
    with pytest.raises(UserError, match=message):
        derived(tmp_path, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "no 'zero_optimisation'; did you mean 'zero_optimization'"),
        (
            {"zero_optimization": {"stge": 2}},
            r"with it: .* stge Extra .* \(what it has from there: zero_optimization\.stge",
        ),
        (
            {"flops_profiler": {"enabled": False}, "sequence_parallel": 1},
            "DeepSpeed has no 'sequence_parallel'",
        ),
        (
            {"activation_checkpointing": {"profile": True, "partition_activation": True}},
            r"no 'activation_checkpointing\.partition_activation'; .*\.partition_activations'",
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    """Also one that DeepSpeed itself would pass over in silence."""
    engine, passed = derived(tmp_path, given)
    with pytest.raises(UserError, match=message), accepted("ds.json", passed):
        check_known(engine, "ds.json", passed)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Named in the error."""
    with pytest.raises(UserError, match=r"trainer\.config=.*none\.json can't be read"):
        derive(CFG, DeepSpeed(config=str(tmp_path / "none.json")), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4}, "stage must be 0, 1, 2 or 3, got 4"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"stage": 0, "offload_optimizer": True}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_params": True}, "offload_params needs stage 3, got stage 2"),
    ],
)
def test_options_that_no_stage_can_do(options: dict[str, Any], message: str) -> None:
    """Each with the rule and the value."""
    with pytest.raises(ValueError, match=message):
        DeepSpeed(**options)
