"""Evaluation: metrics of a split, of its groups, and with averaged weights that are put back."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcore import UserError, hookimpl, plugin
from ftcore.batches import make_batch
from ftcore.evaluation import averaged, predict, score
from ftcore.loop import train
from ftcore.run import _finish

ROWS = [
    {"text": "ab" * (1 + i * 7 % 5), "label": "yes" if i % 3 else "no", "site": "uk" if i < 6 else "de"}
    for i in range(10)
]


def evaluated(job: Any) -> dict[str, float]:
    """Metrics of the validation rows."""
    predictions = predict(job, "validation")
    assert predictions is not None
    return score(job, predictions, "validation", "eval")


def test_metrics_are_those_of_the_rows_whatever_the_batch_size(open_tiny: Any) -> None:
    """Against one forward over all rows; the model goes back to training mode."""
    job = open_tiny({"train.micro_batch_size": 3}, validation=ROWS)
    job.strategy.model.train()
    found = evaluated(job)
    assert job.strategy.model.training
    rows = job.prepared.splits["validation"]
    batch = make_batch(job, rows, torch.arange(len(rows)).numpy(), 0)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = job.strategy.model.eval()(**batch).logits
    assert found["eval/nll"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5
    )
    assert found["eval/accuracy"] == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))


def test_rows_reach_plugins_in_the_order_of_the_data(open_tiny: Any) -> None:
    """Predictions are gathered by row, although batches go by length."""

    @plugin()
    class Reader:
        @hookimpl
        def evaluate(self, predictions: Any, labels: Any, split: str) -> None:
            self.seen = [labels[i] for i in predictions["label"]], split

    reader = Reader()
    evaluated(open_tiny({"train.micro_batch_size": 3}, reader, validation=ROWS))
    assert reader.seen == ([row["label"] for row in ROWS], "validation")


def test_groups_have_metrics_of_their_own_and_a_worst_one(open_tiny: Any) -> None:
    """Group accuracies, weighted by their rows, give the whole; the worst is the smallest."""
    overrides = {"data.columns.group": "site"}
    found = evaluated(open_tiny(overrides, train=ROWS, validation=ROWS))
    uk, de = found["eval/group/uk/accuracy"], found["eval/group/de/accuracy"]
    assert (6 * uk + 4 * de) / 10 == pytest.approx(found["eval/accuracy"])
    assert found["eval/worst_group/accuracy"] == min(uk, de)


def test_worst_group_is_the_largest_where_smaller_is_better(open_tiny: Any) -> None:
    """`-nll` turns the comparison around."""
    overrides = {"data.columns.group": "site", "task.metric": "-nll"}
    found = evaluated(open_tiny(overrides, train=ROWS, validation=ROWS))
    assert found["eval/worst_group/nll"] == max(found["eval/group/uk/nll"], found["eval/group/de/nll"])


def test_worst_group_may_pick_the_best_weights(open_tiny: Any) -> None:
    """`task.metric=worst_group/accuracy` is a metric like any other."""
    overrides = {"data.columns.group": "site", "task.metric": "worst_group/accuracy", "train.steps": 1}
    job = open_tiny(overrides, train=ROWS, validation=ROWS)
    train(job)
    best = job.progress.best
    assert best["eval/worst_group/accuracy"] == min(best[f"eval/group/{g}/accuracy"] for g in ("uk", "de"))


def test_misspelt_metric_is_refused_before_anything_loads(open_tiny: Any) -> None:
    """Where core alone evaluates, the metrics are known beforehand."""
    with pytest.raises(UserError, match=r"task\.metric: .*no 'acuracy'; did you mean 'accuracy'\?"):
        open_tiny({"task.metric": "acuracy"})


@pytest.mark.parametrize("group", [None, "site"])
def test_metric_that_no_plugin_gives_names_those_there_are(open_tiny: Any, group: str | None) -> None:
    """A plugin may bring metrics, so a misspelt one is found at the first evaluation, groups or not."""
    job = open_tiny({"data.columns.group": group, "train.steps": 1}, train=ROWS, validation=ROWS)
    job.cfg.task.metric = "spread"
    with pytest.raises(UserError, match=r"no metric 'spread'; there are: .*accuracy"):
        train(job)


@plugin()
class Zeros:
    """Evaluate and export with a head of zeros."""

    @hookimpl
    def eval_weights(self, shards: Any) -> Any:
        return {s.name: torch.zeros_like(s.value) for s in shards if s.name.startswith("classifier")}


def test_averaged_weights_are_used_and_put_back(open_tiny: Any) -> None:
    """`eval_weights` decides the metrics, and the training weights come back bit for bit."""
    job = open_tiny({}, Zeros(), validation=ROWS)
    before = {name: p.detach().clone() for name, p in job.strategy.model.named_parameters()}
    with averaged(job):
        found = evaluated(job)
    assert found["eval/nll"] == pytest.approx(0.6931472, rel=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in job.strategy.model.named_parameters())


@pytest.mark.parametrize("splits", [{"validation": ROWS, "test": ROWS}, {"test": ROWS}])
def test_what_was_evaluated_is_tested_and_exported(open_tiny: Any, splits: Any) -> None:
    """The exported head is the one that `eval_weights` gave, with and without validation data."""
    job = open_tiny({"train.steps": 3, "train.eval_every": 1}, Zeros(), **splits)
    train(job)
    assert job.strategy.model.classifier.weight.abs().sum() > 0  # trained on
    result = _finish(job)
    assert result["metrics"]["test/nll"] == pytest.approx(0.6931472, rel=1e-6)
    exported = load_file(job.run_dir / "model" / "model.safetensors")
    assert float(exported["classifier.weight"].abs().sum()) == 0
    assert float(exported["bert.pooler.dense.weight"].abs().sum()) > 0


def test_run_asked_to_stop_stops_evaluating(open_tiny: Any) -> None:
    """No metrics of half a split."""
    job = open_tiny({}, validation=ROWS)
    job.stop.code = 75
    assert predict(job, "validation") is None
