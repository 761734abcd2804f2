"""The loop: one gradient for every split of a step, penalties, gradients as hooks see them, failures."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ftcore import LossTerm, UserError, hookimpl, plugin
from ftcore.batches import make_batch
from ftcore.errors import Interrupted, TrainingError
from ftcore.loop import run_step, train


def sampler(job: Any) -> Any:
    """The sampler that `train` would build."""
    return job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, job.cfg.seed)


def weights(job: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: p.detach().clone() for name, p in job.strategy.model.named_parameters()}


def mean_loss_gradients(job: Any) -> dict[str, torch.Tensor]:
    """Gradients of the mean cross entropy of the first step's rows, in one forward, without the loop."""
    rows = sampler(job)(0, 0)
    batch = make_batch(job, job.prepared.splits["train"], rows, 0)
    labels = batch.pop("labels")
    loss = F.cross_entropy(job.strategy.model(**batch).logits, labels)
    params = job.strategy.params
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@plugin()
class Spy:
    """Keeps the gradients that `on_gradients` shows, and the rate."""

    @hookimpl
    def on_gradients(self, shards: Any, lr: float) -> None:
        self.seen = {s.name: s.grad.clone().view(s.shape) for s in shards}
        self.lr = lr


@plugin()
class Decay:
    """A quadratic penalty on every weight."""

    strength: float = 0.5

    @hookimpl
    def regularize(self, shards: Any) -> Any:
        return {"decay": self.strength * sum(s.value.pow(2).sum() for s in shards)}


@plugin()
class Extra:
    """Adds a term of a unit that it counts itself."""

    count: float = 0.0
    value: float = 1.0
    unit: str = "extra/things"

    @hookimpl
    def count_units(self) -> dict[str, float]:
        return {"extra/things": self.count}

    @hookimpl(wrapper=True)
    def compute_loss(self, outputs: Any) -> Any:
        terms = yield
        terms["extra"] = LossTerm(sum=outputs.logits.sum() * 0 + self.value, unit=self.unit, weight=0.5)
        return terms


@pytest.mark.parametrize("size", [16, 8, 4, 1, 5])
def test_gradient_is_the_mean_over_rows_for_every_micro_batch_size(open_tiny: Any, size: int) -> None:
    """Each gradient is that of the mean loss over the 16 rows, however they are split."""
    job = open_tiny({"train.micro_batch_size": size}, spy := Spy())
    expected = mean_loss_gradients(job)
    record = run_step(job, sampler(job), total=4)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected.values()]))
    assert float(record["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(spy.seen[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("path", ["ftcore:tiny_llama", "ftcore:tiny_t5"])
def test_token_losses_do_not_depend_on_the_split(open_tiny: Any, path: str) -> None:
    """Micro-batches of unequal token counts give the loss and the gradient of the whole step."""
    rows = [{"text": "a" * (1 + i * i % 19), "target": "b" * (1 + i % 5)} for i in range(16)]
    task = "causal_lm" if path.endswith("llama") else "seq2seq"
    records = []
    for size in (16, 3):
        job = open_tiny(
            {"model.path": path, "task.name": task, "train.micro_batch_size": size, "train.resume": False},
            train=rows,
        )
        records.append(run_step(job, sampler(job), total=4))
    assert float(records[0]["grad_norm"]) == pytest.approx(float(records[1]["grad_norm"]), rel=1e-4)
    assert float(records[0]["loss"][0]) == pytest.approx(float(records[1]["loss"][0]), rel=1e-5)


def test_penalty_has_the_gradient_of_the_same_penalty_in_the_loss(open_tiny: Any) -> None:
    """`regularize` adds exactly the penalty's own gradient, once a step, whatever the micro-batches."""
    job = open_tiny({"train.micro_batch_size": 4}, Decay(strength=0.3), spy := Spy())
    task, before = mean_loss_gradients(job), weights(job)
    record = run_step(job, sampler(job), total=4)
    for name, gradient in task.items():
        torch.testing.assert_close(spy.seen[name], gradient + 2 * 0.3 * before[name], rtol=1e-4, atol=1e-6)
    penalty = 0.3 * sum(w.double().pow(2).sum() for w in before.values())
    assert float(record["terms"]["decay"]) == pytest.approx(float(penalty), rel=1e-5)
    assert float(record["loss"][1]) == pytest.approx(float(penalty), rel=1e-5)


def test_gradients_are_seen_before_clipping_and_the_norm_is_of_before(open_tiny: Any) -> None:
    """Clipping changes neither what `on_gradients` sees nor the logged norm; the rate is the schedule's."""
    job = open_tiny({"train.max_grad_norm": 1e-6, "optim.lr": 0.5, "optim.warmup": 4}, spy := Spy())
    record = run_step(job, sampler(job), total=10)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in spy.seen.values()]))
    assert float(record["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 1e-3
    assert spy.lr == record["lr"] == 0.5 / 4


def test_what_on_gradients_writes_is_stepped_with(open_tiny: Any) -> None:
    """A plugin that zeroes gradients leaves the weights as they are (without decay)."""

    @plugin()
    class Zero:
        @hookimpl
        def on_gradients(self, shards: Any) -> None:
            for shard in shards:
                shard.grad.zero_()

    job = open_tiny({"optim.weight_decay": 0.0}, Zero())
    before = weights(job)
    run_step(job, sampler(job), total=4)
    assert all(torch.equal(value, before[name]) for name, value in weights(job).items())


def test_extra_term_is_normalised_by_its_own_unit_and_weighted(open_tiny: Any) -> None:
    """A term's record is Σ sum / N without its weight; the loss has it with the weight."""
    job = open_tiny({"train.micro_batch_size": 4}, Extra(count=2.0, value=3.0))
    record = run_step(job, sampler(job), total=4)
    extra, task = float(record["terms"]["extra"]), float(record["terms"]["task"])
    assert extra == pytest.approx(4 * 3.0 / (4 * 2.0))
    assert float(record["loss"][0]) == pytest.approx(task + 0.5 * extra, rel=1e-6)


def test_term_without_any_unit_is_logged_as_null(open_tiny: Any) -> None:
    """N = 0 of an extra term: it adds nothing, and `metrics.jsonl` says null, not 0."""
    job = open_tiny({"train.steps": 1, "train.micro_batch_size": 8}, Extra(count=0.0))
    train(job)
    record = json.loads((job.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss/extra"] is None
    assert record["loss"] == pytest.approx(record["loss/task"])


def test_unit_that_nothing_counts_is_an_error(open_tiny: Any) -> None:
    """A misspelt unit names the term and the units there are."""
    job = open_tiny({}, Extra(unit="exampels"))
    with pytest.raises(UserError, match=r"'extra' has the unit 'exampels'.*examples, tokens"):
        run_step(job, sampler(job), total=4)


def test_value_stands_in_for_the_logged_sum(open_tiny: Any) -> None:
    """A term that is normalised already (unit `step`) logs `value`, summed over the micro-batches."""

    @plugin()
    class Auxiliary:
        @hookimpl(wrapper=True)
        def compute_loss(self, outputs: Any) -> Any:
            terms = yield
            zero = outputs.logits.sum() * 0
            terms["aux"] = LossTerm(sum=zero + 2.0, unit="step", value=torch.tensor(0.25))
            return terms

    job = open_tiny({"train.micro_batch_size": 4}, Auxiliary())
    record = run_step(job, sampler(job), total=4)
    assert float(record["terms"]["aux"]) == pytest.approx(4 * 0.25)
    assert float(record["loss"][0]) == pytest.approx(float(record["terms"]["task"]) + 8.0, rel=1e-6)


@pytest.mark.parametrize("through_the_model", [True, False])
def test_loss_that_is_not_finite_stops_before_the_weights_change(
    open_tiny: Any, through_the_model: bool
) -> None:
    """The error names the step, the terms and the rows; the weights are bit for bit as before."""

    @plugin()
    class Broken:
        @hookimpl(wrapper=True)
        def compute_loss(self, outputs: Any) -> Any:
            terms = yield
            total = outputs.logits.sum() * float("inf") if through_the_model else torch.tensor(float("inf"))
            terms["extra"] = LossTerm(sum=total, unit="examples")
            return terms

    job = open_tiny({"train.micro_batch_size": 8}, Broken())
    before, rows = weights(job), sampler(job)(0, 0).tolist()
    with pytest.raises(TrainingError, match=r"step 1: .*task 0\.\d+.*extra -?(inf|nan)") as caught:
        run_step(job, sampler(job), total=4)
    assert str(rows) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in weights(job).items())


def test_run_asked_to_stop_finishes_its_step_and_saves(open_tiny: Any) -> None:
    """A signal's code comes back as the exit code, with the state of the step in hand saved."""
    job = open_tiny({"train.steps": 5})
    job.stop.code = 75
    with pytest.raises(Interrupted, match="stopped at step 1, saved") as caught:
        train(job)
    assert caught.value.exit_code == 75
    assert [d.name for d in job.checkpoints.iterdir()] == ["step-1"]


def test_early_stop_counts_evaluations_without_a_new_best(open_tiny: Any) -> None:
    """With a rate of almost zero nothing gets better: the run ends after the first and two more."""
    rows = [{"text": "abc", "label": "yes"}, {"text": "abd", "label": "no"}] * 4
    overrides = {"train.steps": 9, "train.eval_every": 1, "train.early_stop": 2, "optim.lr": 1e-12}
    job = open_tiny(overrides, train=rows, validation=rows)
    train(job)
    assert job.progress.step == 3
    assert job.progress.best_weights == "best-1"


@plugin()
class Odd:
    """A metric that is not a number at first."""

    def __init__(self) -> None:
        self.values = iter([float("nan"), 0.1, float("nan"), 0.3, 0.2])

    @hookimpl
    def evaluate(self, predictions: Any) -> dict[str, float]:
        return {"odd": next(self.values)}


def test_what_is_no_number_is_never_better_than_a_number(open_tiny: Any) -> None:
    """Nor does it keep later weights from being the best."""
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    job = open_tiny({"train.steps": 5, "train.eval_every": 1}, Odd(), validation=rows)
    job.cfg.task.metric = "odd"
    train(job)
    assert (job.progress.best_weights, job.progress.best["eval/odd"]) == ("best-4", 0.3)
