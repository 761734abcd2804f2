"""ZeRO against one process: the same losses, gradients and weights, however split, saved and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcore import proofs
from ftcore.config import from_plain

from . import cases
from .cases import run_case, trajectory, zero

STAGES = (0, 1, 2, 3)
SINGLE = {"trainer.strategy": "single", "trainer.device": "cpu"}
MIXOUT = {"plugin.mixout.p": 0.5}
ELEMENT = {"plugin.mixout.p": 0.5, "plugin.mixout.granularity": "element", "plugin.mixout.decay": 0.1}
WHOLE_STEP = {"train.micro_batch_size": 4}
T5 = {
    "model.path": "ftcore:tiny_t5",
    "task.name": "seq2seq",
    "data.columns.target": "label",
    "task.max_new_tokens": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixout": MIXOUT,
    "element": ELEMENT,
    "checkpointing": {"train.gradient_checkpointing": True},
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16"},
    "unclipped": {"train.max_grad_norm": None},
}
WHERE = [(name, stage) for name in ("plain", "mixout") for stage in STAGES]
WHERE += [("element", 0), ("element", 2), ("element", 3), ("checkpointing", 3), ("unclipped", 2)]
HALF = [("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 2), ("fp16", 3)]
OFFLOAD = {
    1: {"offload_optimizer": True},
    2: {"offload_optimizer": True},
    3: {"offload_optimizer": True, "offload_params": True},
}
RESUMED = MIXOUT | {"model.dropout": 0.1}
OVERFLOW = ELEMENT | {"train.precision": "fp16", "scale": 2.0**60, "export": True}


def on_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Every case for two ranks, by name."""
    found = {f"{name}-{stage}": zero(stage) | VARIANTS[name] for name, stage in (*WHERE, *HALF)}
    for stage in STAGES:
        found[f"resumable-{stage}"] = zero(stage) | RESUMED | {"export": True}
        found[f"half-{stage}"] = zero(stage) | RESUMED | {"stop_at": 2, "export": True}
        found[f"again-{stage}"] = zero(stage) | RESUMED | {"from": f"half-{stage}", "export": True}
        found[f"onward-{stage}"] = zero((stage + 2) % 4) | RESUMED | {"from": f"half-{stage}"}
        found[f"from-single-{stage}"] = zero(stage) | RESUMED | {"from": "half"}
    found |= {f"skipped-{s}": zero(s) | OVERFLOW | {"from": f"half-{s}"} for s in (0, 2, 3)}
    found |= {f"offload-{stage}": zero(stage, **options) for stage, options in OFFLOAD.items()}
    found |= {f"accumulation-{stage}": zero(stage) | WHOLE_STEP for stage in (2, 3)}
    found["ddp"] = {"trainer.strategy": "ddp", "trainer.device": "cpu"} | RESUMED | {"from": "half-3"}
    found |= {f"nan-{stage}": zero(stage) | {"nan_on": 1} for stage in (0, 3)}
    found |= {f"toy-{stage}": {"toy": stage} for stage in STAGES}
    rows = str(folder / "train.jsonl")
    found |= {f"t5-{stage}": zero(stage) | T5 | {"data.validation": rows} for stage in (1, 3)}
    found["pretrained-3"] = zero(3) | {"model.path": str(folder / "pretrained"), "export": True}
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Path:
    """The folder of all runs: one process here, then two ranks, and the references of each."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("runs")
    cases.write(folder, {})
    for name, variant in VARIANTS.items():
        run_case(folder, name, SINGLE | variant)
    run_case(folder, "t5", SINGLE | T5 | {"data.validation": str(folder / "train.jsonl")})
    run_case(folder, "resumable", SINGLE | RESUMED | {"export": True})
    run_case(folder, "half", SINGLE | RESUMED | {"stop_at": 2})
    AutoModel.from_pretrained(folder / "resumable/model").save_pretrained(folder / "pretrained")
    AutoTokenizer.from_pretrained(folder / "resumable/model").save_pretrained(folder / "pretrained")
    run_case(folder, "pretrained-single", SINGLE | {"model.path": str(folder / "pretrained"), "export": True})
    run_ranks(folder, 2, on_ranks(folder))
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.mark.parametrize(("name", "stage"), WHERE)
def test_losses_and_gradients_are_those_of_one_process(ran: Path, name: str, stage: int) -> None:
    """Loss and gradient norm of each step: four micro-batches in one process, two on each of two ranks."""
    assert len(trajectory(ran, name)) == 8
    assert trajectory(ran, f"{name}-{stage}") == pytest.approx(trajectory(ran, name), rel=1e-5)


@pytest.mark.parametrize(("name", "stage"), HALF)
def test_half_precision_is_autocast_as_elsewhere(ran: Path, name: str, stage: int) -> None:
    """The same computation in half: what differs is rounding."""
    assert trajectory(ran, f"{name}-{stage}") == pytest.approx(trajectory(ran, name), rel=2e-2)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_overflows_in_fp16_changes_nothing(ran: Path, stage: int) -> None:
    """Neither the optimiser nor mixout's decay moves a weight, and the steps are counted."""
    before, after = weights(ran, f"half-{stage}"), weights(ran, f"skipped-{stage}")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.tensor(trajectory(ran, f"skipped-{stage}")[1::2]).isfinite().any()
    assert records(ran, f"skipped-{stage}")[-1]["skipped_fp16_overflow"] == 2


@pytest.mark.parametrize("stage", OFFLOAD)
def test_offloading_changes_no_step(ran: Path, stage: int) -> None:
    """Optimiser (and weights, at stage 3) on the CPU give the same losses and gradients."""
    assert trajectory(ran, f"offload-{stage}") == pytest.approx(trajectory(ran, "plain"), rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_changes_no_gradient(ran: Path, stage: int) -> None:
    """One micro-batch of four rows on each rank, or two of two."""
    assert trajectory(ran, f"accumulation-{stage}") == pytest.approx(trajectory(ran, "plain"), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_for_bit_the_one_never_stopped(ran: Path, stage: int) -> None:
    """With dropout and mixout, on two ranks."""
    whole, resumed = (weights(ran, f"{name}-{stage}") for name in ("resumable", "again"))
    assert len(trajectory(ran, f"half-{stage}")) == len(trajectory(ran, f"again-{stage}")) == 4
    assert whole.keys() == resumed.keys() == weights(ran, "resumable").keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ["again", "onward", "from-single"])
@pytest.mark.parametrize("stage", STAGES)
def test_any_strategy_resumes_any_checkpoint(ran: Path, name: str, stage: int) -> None:
    """Of its own stage, another stage, or one process: the losses of the run that was never stopped."""
    rest = trajectory(ran, "resumable")[4:]
    assert trajectory(ran, f"{name}-{stage}") == pytest.approx(rest, rel=1e-6)


def test_other_strategies_resume_it(ran: Path) -> None:
    """A checkpoint of stage 3 on two ranks, by ddp and in one process; its moments are all there."""
    rest = trajectory(ran, "resumable")[4:]
    run_case(ran, "back", SINGLE | RESUMED | {"from": "half-3"})
    assert trajectory(ran, "ddp") == pytest.approx(rest, rel=1e-6)
    assert trajectory(ran, "back") == pytest.approx(rest, rel=1e-6)


def test_more_ranks_resume_it(ran: Path, run_ranks: Any) -> None:
    """From two ranks to three, which divide no weight evenly."""
    run_ranks(ran, 3, {f"three-{s}": zero(s) | RESUMED | {"from": f"half-{s}"} for s in (1, 3)})
    for stage in (1, 3):
        rest = trajectory(ran, "resumable")[4:]
        assert trajectory(ran, f"three-{stage}")[0] == pytest.approx(rest[0], rel=1e-6)
        assert trajectory(ran, f"three-{stage}") == pytest.approx(rest, rel=1e-5)


def test_a_model_split_while_it_loads_is_the_same_model(ran: Path) -> None:
    """Its new head too; and the export of stage 3 has every tensor, equal to that of one process."""
    assert trajectory(ran, "pretrained-3") == pytest.approx(trajectory(ran, "pretrained-single"), rel=1e-5)
    split, single = weights(ran, "pretrained-3"), weights(ran, "pretrained-single")
    assert split.keys() == single.keys()
    assert all(torch.allclose(split[n], single[n], atol=1e-4) for n in single)


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_generate_in_step(ran: Path, stage: int) -> None:
    """An evaluation by generation, whose rows end after different numbers of tokens, ends and is the same."""
    one, two = (records(ran, name)[-1] for name in ("t5", f"t5-{stage}"))
    assert two == pytest.approx(one, rel=1e-5)
    assert any(key.startswith("eval/") for key in one)


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_that_a_step_does_not_use_has_no_gradient(ran: Path, stage: int) -> None:
    """Not that of the step before; what is used has the sum over ranks and micro-batches."""
    for rank in range(2):
        first, second = json.loads((ran / f"toy-{stage}-{rank}.json").read_text())["gradients"]
        for name in ("a", "b"):
            assert set(first[f"{name}.weight"]) <= {2 * 2 * (1.0 + 2.0)}  # rows, micro-batches, ranks
        assert second["a.weight"] == first["a.weight"]
        assert set(second["b.weight"] + second["b.bias"]) <= {0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_into_shards_is_the_model_on_all_ranks(ran: Path, stage: int) -> None:
    """Slices cover each parameter once; numbered by them, the two layers give the sum of their elements."""
    ranks = [json.loads((ran / f"toy-{stage}-{rank}.json").read_text()) for rank in range(2)]
    for name, size in (("a.weight", 15), ("a.bias", 5), ("b.weight", 15), ("b.bias", 5)):
        slices = [rank["covered"][name][:2] for rank in ranks]
        assert sorted(i for start, count in slices for i in range(start, start + count)) == list(range(size))
    assert ranks[0]["output"] == ranks[1]["output"] == 2 * (sum(range(15)) + sum(range(5)))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_element_without_an_owner_is_refused(ran: Path, stage: int) -> None:
    """As some settings of a DeepSpeed JSON would have it: each rank says so before it trains."""
    for rank in range(2):
        found = json.loads((ran / f"toy-{stage}-{rank}.json").read_text())
        assert "ranks own 25 elements of 40" in found["refused"]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_is_named_with_its_rank(ran: Path, stage: int) -> None:
    """All ranks stop at that step, and name the one whose loss it is, with its rows."""
    one, two = ((ran / f"nan-{stage}" / f"error-{rank}").read_text() for rank in range(2))
    assert one == two
    assert (
        "step 1: the loss or its gradient is not finite (loss terms on rank 1: task nan; training rows" in one
    )


def test_check_proves_the_export_in_one_process(tmp_path: Path) -> None:
    """As under `single`, whatever ranks the trainer would start; on training rows if need be."""
    cases.write(tmp_path, {})
    made = cases.COMMON | {"data.train": str(tmp_path / "train.jsonl")} | zero(3, devices=2)
    assert proofs.export_proof(from_plain(cases.nested(made)), tmp_path / "export").ok
