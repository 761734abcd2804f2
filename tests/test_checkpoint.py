"""Checkpoints: bitwise round trips, resuming, two ranks' files read whole, damage, pruning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore import UserError, hookimpl, plugin
from ftcore.checkpoint import Checkpoint, newest, prune, save
from ftcore.loop import run_step
from ftcore.strategies import Single

TWO_RANKS = """
import sys
from pathlib import Path
import torch
from ftcore.checkpoint import save
from ftcore.config import Config, TrainerConfig
from ftcore.strategies import DDP

strategy = DDP(Config(trainer=TrainerConfig(strategy="ddp", device="cpu")))
torch.manual_seed(5 + strategy.rank)  # rank 0's weights are everyone's
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
strategy.prepare(model, lambda m: torch.optim.AdamW(m.parameters()))
for step in range(2):
    x = torch.arange(12.0).view(4, 3) / 10 * (1 + strategy.rank + step)
    strategy.backward(model.eval()(x).square().sum())
    strategy.finish_gradients()
    strategy.step(0.01)
save(Path(sys.argv[1]) / "step-2", strategy, {"step": 2, "best_weights": ""})
if strategy.rank == 0:
    whole = {n: [p.detach(), *strategy.optimizer.state[p].values()] for n, p in model.named_parameters()}
    torch.save(whole, Path(sys.argv[1]) / "whole.pt")
strategy.close()
"""

BLOCKED = """
import sys
from pathlib import Path
import torch
from ftcore import UserError
from ftcore.checkpoint import save
from ftcore.config import Config, TrainerConfig
from ftcore.strategies import DDP

strategy = DDP(Config(trainer=TrainerConfig(strategy="ddp", device="cpu")))
model = torch.nn.Linear(3, 2)
strategy.prepare(model, lambda m: torch.optim.AdamW(m.parameters()))
try:
    save(Path(sys.argv[1], "blocked", "step-2"), strategy, {"step": 2})
except UserError as error:
    Path(sys.argv[1], f"refused-{strategy.rank}").write_text(str(error))
strategy.close()
"""


def small(config: Any, seed: int) -> Single:
    """A strategy that holds a small model with one frozen parameter and a buffer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    strategy = Single(config())
    strategy.prepare(model, lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]))
    return strategy


def advance(strategy: Single, steps: int) -> None:
    """Take optimiser steps on fixed inputs."""
    for step in range(steps):
        strategy.backward(strategy.model(torch.arange(20.0).view(5, 4) / (7 + step)).square().sum())
        strategy.finish_gradients()
        strategy.step(0.01)


def state_of(strategy: Single) -> dict[str, torch.Tensor]:
    """Every number of the model and its optimiser, by name."""
    found = dict(strategy.model.state_dict())
    for name, param in strategy.params.items():
        found |= {f"{name}/{k}": torch.as_tensor(v) for k, v in strategy.optimizer.state[param].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def step_dir(root: Path, step: int, best: str = "", strategy: Any = None) -> Path:
    """Write a checkpoint as a run does."""
    save(root / f"step-{step}", strategy, {"step": step, "best_weights": best})
    return root / f"step-{step}"


def test_round_trip_is_bitwise_with_moments_and_step(config: Any, tmp_path: Path) -> None:
    """Values, buffers, AdamW's moments and its step come back bit for bit, and training goes on alike."""
    saved, loaded = small(config, seed=1), small(config, seed=2)
    advance(saved, 3)
    checkpoint = Checkpoint(step_dir(tmp_path, 3, strategy=saved))
    loaded.load(checkpoint)
    checkpoint.load_buffers(loaded.model)
    loaded.model[0].bias.data.copy_(saved.model[0].bias)  # frozen: comes with the pretrained weights
    for strategy in (saved, loaded):
        if strategy is saved:
            expected = state_of(strategy)
        assert all(torch.equal(v, expected[k]) for k, v in state_of(strategy).items())
    advance(saved, 2)
    advance(loaded, 2)
    assert all(torch.equal(v, state_of(saved)[k]) for k, v in state_of(loaded).items())


def test_values_only_holds_no_moments(config: Any, tmp_path: Path) -> None:
    """Best weights are saved without the optimiser's tensors."""
    strategy = small(config, seed=1)
    advance(strategy, 1)
    save(tmp_path / "best-1", strategy, {"step": 1}, values_only=True)
    assert Checkpoint(tmp_path / "best-1").kinds("0.weight") == {"value"}
    step_dir(tmp_path, 1, strategy=strategy)
    assert Checkpoint(tmp_path / "step-1").kinds("0.weight") == {"value", "exp_avg", "exp_avg_sq"}


def test_resumed_training_is_bitwise_that_of_an_unbroken_run(open_tiny: Any) -> None:
    """Two steps, a save, and two more in another job, dropout on, equal four steps in one."""
    overrides = {"model.dropout": 0.1, "train.micro_batch_size": 5}

    def walk(job: Any, steps: int) -> Any:
        sampler = job.hooks.build_sampler(job.prepared.splits["train"], 16, job.cfg.seed)
        for _ in range(steps):
            run_step(job, sampler, total=4)
            job.progress.step += 1
        return job

    unbroken = state_of(walk(open_tiny(overrides), 4).strategy)
    first = walk(open_tiny(overrides), 2)
    first.save(first.checkpoints / "step-2")
    second = open_tiny(overrides)
    assert (second.progress.step, second.progress.examples) == (2, 32)
    resumed = state_of(walk(second, 2).strategy)
    assert all(torch.equal(value, unbroken[name]) for name, value in resumed.items())


def test_plugin_state_comes_back_with_its_tensors(open_tiny: Any) -> None:
    """A plugin's `state_dict` may mix tensors and plain values."""

    @plugin()
    class Keeper:
        @hookimpl
        def on_step_end(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"mean": torch.tensor([1.5, -2.0]), "count": 7, "names": ["a", "b"]}

    job = open_tiny({}, Keeper())
    job.save(job.checkpoints / "step-1")
    found = Checkpoint(job.checkpoints / "step-1")
    state = found.plugin_state("keeper")
    assert torch.equal(state.pop("mean"), torch.tensor([1.5, -2.0]))
    assert state == {"count": 7, "names": ["a", "b"]}
    assert found.plugin_state("other") is None


def test_checkpoint_of_two_ranks_is_read_whole(run_ranks: Any, tmp_path: Path) -> None:
    """Two gloo ranks write a part each; one process reads values, moments and steps as rank 0 had them."""
    run_ranks(TWO_RANKS, 2, tmp_path)
    assert len(list((tmp_path / "step-2").glob("rank-*.safetensors"))) == 2
    checkpoint = Checkpoint(tmp_path / "step-2")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, (value, step, exp_avg, exp_avg_sq) in whole.items():
        for kind, tensor in (("value", value), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            assert torch.equal(checkpoint.read(kind, name), tensor.flatten()), (kind, name)
        assert checkpoint.state["optimizer"][name]["step"] == float(step) == 2.0
    assert all(v.numel() > 1 and not torch.equal(e, torch.zeros_like(e)) for v, _, e, _ in whole.values())


def test_directory_that_cannot_be_made_is_an_error_on_every_rank(run_ranks: Any, tmp_path: Path) -> None:
    """Rank 0 alone makes it; where it can't, no rank waits for it for ever."""
    (tmp_path / "blocked").write_text("a file in the way")
    run_ranks(BLOCKED, 2, tmp_path)
    messages = [(tmp_path / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert "can't save" in messages[0]
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "buffers.safetensors"])
def test_damaged_file_is_detected_and_named(config: Any, tmp_path: Path, name: str) -> None:
    """One flipped byte in any file makes the checkpoint invalid."""
    directory = step_dir(tmp_path, 1, strategy=small(config, seed=1))
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=f"damaged: {name}"):
        Checkpoint(directory)


def test_newest_falls_back_to_the_last_valid_one(config: Any, tmp_path: Path) -> None:
    """Steps are ordered as numbers; what is damaged or unfinished is skipped and reported."""
    strategy = small(config, seed=1)
    for step in (2, 9, 10, 11):
        step_dir(tmp_path, step, strategy=strategy)
    (tmp_path / "step-11" / "manifest.json").unlink()
    (tmp_path / "step-10" / "rank-00000.safetensors").unlink()
    (tmp_path / ".writing-step-12").mkdir()
    found, problems = newest(tmp_path)
    assert found is not None
    assert found.directory.name == "step-9"
    assert ["step-11" in problems[0], "step-10" in problems[1]] == [True, True]
    assert newest(tmp_path / "nowhere") == (None, [])


def test_parameter_that_was_not_saved_is_an_error(config: Any, tmp_path: Path) -> None:
    """A checkpoint of another model says what it lacks."""
    checkpoint = Checkpoint(step_dir(tmp_path, 1, strategy=small(config, seed=1)))
    with pytest.raises(UserError, match=r"lacks value/other\.weight"):
        checkpoint.read("value", "other.weight")


def test_prune_keeps_the_last_and_the_best_weights_they_name(config: Any, tmp_path: Path) -> None:
    """Best weights stay while a kept checkpoint names them, and the newest always does."""
    strategy = small(config, seed=1)
    for step, best in ((2, "best-2"), (4, "best-4"), (10, "best-4")):
        step_dir(tmp_path, step, best, strategy)
    for best in ("best-2", "best-4", "best-9", "best-12"):
        (tmp_path / best).mkdir()
    prune(tmp_path, keep_last=2)
    assert sorted(d.name for d in tmp_path.glob("*-*")) == ["best-12", "best-4", "step-10", "step-4"]


def test_save_that_fails_leaves_what_was_there(config: Any, tmp_path: Path) -> None:
    """A checkpoint that can't be written is one error, with no half of it left behind."""
    strategy = small(config, seed=1)
    root = tmp_path / "checkpoints"
    step_dir(root, 1, strategy=strategy)
    before = json.loads((root / "step-1" / "manifest.json").read_text())
    (root / ".writing-step-2").write_text("in the way")
    with pytest.raises(UserError, match=r"can't save .*step-2.*earlier checkpoints are intact"):
        step_dir(root, 2, strategy=strategy)
    assert json.loads((root / "step-1" / "manifest.json").read_text()) == before
    assert not (root / "step-2").exists()
