"""Training with the term: one gradient however a step is split, and what is refused, logged and warned of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcore import Batch, UserError, hookimpl, plugin
from ftcore.batches import micro_batches
from ftcore.defaults import Defaults
from ftcore.hooks import Hooks
from ftcore.hookspecs import names
from ftcore.loop import run_step, train
from ftcore.plugins import Enabled
from ftcore.seeding import seed_global
from ftcore_contrastive import supervised_contrastive

STEPS = 4
QUIET = {"model.dropout": 0.0}
ALONE = {"weight": 1.0}  # the contrastive term and nothing else


@plugin()
class Spy:
    """Keeps the gradients of a step, in the weights' own precision."""

    @hookimpl
    def on_gradients(self, shards: Any) -> None:
        self.seen = {s.name: s.grad.clone().view(s.shape) for s in shards}


def add(job: Any, instance: Any, first: bool = False) -> Any:
    """Register a plugin's instance in an open job, as if it had been chosen."""
    name = type(instance).__name__
    one = Enabled(name=name, instance=instance, distribution="", version="0", options={})
    plugins = [one, *job.hooks.plugins] if first else [*job.hooks.plugins, one]
    job.hooks = Hooks(Defaults(job.cfg), plugins, job.cfg)
    return instance


def sampler(job: Any) -> Any:
    return job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, job.cfg.seed)


def gradients(job: Any, at: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of step `at` as `on_gradients` sees them, the model in float64."""
    spy = add(job, Spy())
    job.strategy.model.double()
    job.hooks.on_train_start(job.state(STEPS))
    job.progress.step = at
    run_step(job, sampler(job), STEPS)
    return spy.seen


def assert_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rel: float = 1e-9
) -> None:
    """Every gradient, relative to the largest element of all."""
    size = max(float(g.abs().max()) for g in expected.values())
    assert size > 0
    for name, grad in expected.items():
        off = float((found[name] - grad).abs().max())
        assert off <= rel * size, f"{name}: off by {off / size:.1e}"


def one_pass(job: Any, at: int, groups: str, reduction: str, weight: float) -> dict[str, torch.Tensor]:
    """Gradients by autograd through one graph of the whole step, forwards seeded as the loop seeds them."""
    model = job.strategy.model.double()
    epoch, within = divmod(at, sampler(job).steps_per_epoch)
    batches = micro_batches(job, sampler(job)(epoch, within), epoch)
    states, labels, entropy = [], [], []
    for batch in batches:
        seed_global(torch.device("cpu"), job.cfg.seed, "step", at, batch.micro_batch)
        rest = {k: v for k, v in batch.items() if k != "labels"}
        outputs = model(**rest, output_hidden_states=True)
        states.append(outputs.hidden_states[-1][:, 0])
        labels.append(batch["labels"])
        entropy.append(torch.nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="none"))
    if groups == "global":
        states, labels = [torch.cat(states)], [torch.cat(labels)]
    sums = [supervised_contrastive(z, y, 0.3, reduction="sum") for z, y in zip(states, labels, strict=True)]
    anchors = sum(int(sum((y == one).sum() > 1 for one in y)) for y in labels)
    contrast = sum(sums) / (anchors if reduction == "mean" else len(sums))
    loss = (1 - weight) * torch.cat(entropy).mean() + weight * contrast
    params = job.strategy.params
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", ["micro", "global"])
@pytest.mark.parametrize("at", [0, 1], ids=["full step", "short step"])
def test_the_gradient_is_that_of_one_pass(open_tiny: Any, batch: str, reduction: str, at: int) -> None:
    """With dropout on: the first pass of `global` draws what the second does. Micro-batches of 6, 6, 4."""
    options = {"weight": 0.7, "batch": batch, "reduction": reduction}
    job = open_tiny({"train.micro_batch_size": 6}, options)
    expected = one_pass(open_tiny({"train.micro_batch_size": 6}, run="hand"), at, batch, reduction, 0.7)
    # The cross entropy is core's, in fp32.
    assert_equal(gradients(job, at), expected, rel=1e-5)


@pytest.mark.parametrize("micro", [16, 5, 4, 1])
def test_a_global_step_has_one_gradient_for_every_split(open_tiny: Any, micro: int) -> None:
    """16 x 1 to 1 x 16 and a ragged one, to 1e-9 in float64."""
    whole = gradients(open_tiny(QUIET, ALONE | {"batch": "global"}))
    options = ALONE | {"batch": "global"}
    assert_equal(gradients(open_tiny(QUIET | {"train.micro_batch_size": micro}, options, run="split")), whole)


@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
def test_a_global_step_with_mixout(open_tiny: Any, mask_scope: str) -> None:
    """A mixture of the step gives one gradient for every split; one of each micro-batch passes the check."""
    found = [
        gradients(
            open_tiny(
                QUIET | {"train.micro_batch_size": micro},
                ALONE | {"batch": "global"},
                mixout={"mask_scope": mask_scope},
                run=str(micro),
            )
        )
        for micro in (16, 4)
    ]
    if mask_scope == "step":
        assert_equal(found[1], found[0], rel=1e-6)  # the mixture is made in fp32


RANKS = """
import json, os, sys
from pathlib import Path
import datasets, torch, transformers
from safetensors.torch import save_file
from ftcore import hookimpl, plugin, tiny
from ftcore.config import from_plain
from ftcore.defaults import Defaults
from ftcore.hooks import Hooks
from ftcore.job import open_job
from ftcore.loop import run_step
from ftcore.plugins import Enabled
from ftcore.screen import Screen
from ftcore.signals import StopFlag

@plugin()
class Spy:
    @hookimpl
    def on_gradients(self, shards):
        self.seen = {f"{s.name}@{s.offset}": s.grad.clone() for s in shards if s.grad.numel()}

def rank(number, one, folder):
    os.environ |= one["places"][number]
    job = open_job(from_plain(one["config"]), folder, lambda shown: Screen(False), StopFlag())
    spy = Spy()
    enabled = Enabled(name="spy", instance=spy, distribution="", version="0", options={})
    job.hooks = Hooks(Defaults(job.cfg), [*job.hooks.plugins, enabled], job.cfg)
    job.strategy.model.double()
    job.hooks.on_train_start(job.state(4))
    chosen = job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, job.cfg.seed)
    for job.hooks.plugins[0].instance.batch in ("micro", "global"):
        for job.progress.step in (0, 1):
            run_step(job, chosen, 4)
            name = f"{job.hooks.plugins[0].instance.batch}-{one['world']}-{job.progress.step}-{number}"
            save_file(spy.seen, folder / f"{name}.safetensors")
    os._exit(0)

transformers.AutoModelForSequenceClassification.from_config(tiny.config("tiny_bert"))  # for all forks
folder = Path(sys.argv[1])
for one in json.loads((folder / "runs.json").read_text()):
    children = []
    for number in range(one["world"]):
        if (child := os.fork()) == 0:
            rank(number, one, folder)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * one["world"]
"""


def test_ranks_have_the_gradient_of_one_process(open_tiny: Any, run_forked: Any, tmp_path: Path) -> None:
    """At a micro-batch as many times as large, to 1e-9; the second step is short: a rank has a filler."""
    expected, runs = {}, []
    for batch in ("micro", "global"):
        for at in (0, 1):
            job = open_tiny(
                QUIET | {"train.micro_batch_size": 8, "optim.lr": 1e-30},
                ALONE | {"batch": batch},
                f"{batch}{at}",
            )
            expected[batch, at] = gradients(job, at)
    for world in (2, 4):
        plain = dataclasses.asdict(job.cfg)
        plain["trainer"]["strategy"] = "ddp"
        plain["train"]["micro_batch_size"] = 8 // world
        runs.append({"world": world, "config": plain})
    run_forked(RANKS, runs, tmp_path)
    for (batch, at), whole in expected.items():
        for world in (2, 4):
            found = {name: torch.zeros_like(grad).view(-1) for name, grad in whole.items()}
            for rank in range(world):
                for key, part in load_file(tmp_path / f"{batch}-{world}-{at}-{rank}.safetensors").items():
                    name, _, offset = key.rpartition("@")
                    found[name][int(offset) : int(offset) + part.numel()] += part
            assert_equal({name: grad.view(whole[name].shape) for name, grad in found.items()}, whole)


def within_class_share(job: Any) -> float:
    """Of the spread of normalised first-token states, how much is within classes, dropout off."""
    model, rows = job.strategy.model.float().eval(), job.prepared.splits["train"]
    batch = job.hooks.collate([rows[i] for i in range(len(rows))], job.tokenizer, lambda i: None)
    labels = batch.pop("labels")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[-1][:, 0]
    z = torch.nn.functional.normalize(states, dim=1)
    model.train()
    within = sum(float((z[labels == c] - z[labels == c].mean(0)).square().sum()) for c in (0, 1, 2))
    return within / float((z - z.mean(0)).square().sum())


@pytest.mark.parametrize("batch", ["micro", "global"])
def test_the_term_alone_trains_the_encoder(open_tiny: Any, batch: str) -> None:
    """Every encoder weight has a gradient, the head none, and classes draw together."""
    overrides = QUIET | {"train.steps": 40, "train.micro_batch_size": 8, "optim.lr": 3e-3}
    job = open_tiny(overrides, ALONE | {"batch": batch})
    found = gradients(job)
    for name, grad in found.items():
        reaches = name.startswith("bert.") and "pooler" not in name and ".key.bias" not in name
        assert bool(grad.any()) == reaches or ".key.bias" in name or "position" in name, name
    job = open_tiny(overrides, ALONE | {"batch": batch}, run="trained")
    before = within_class_share(job)
    train(job)
    assert within_class_share(job) < 0.5 * before


def losses(job: Any) -> list[dict[str, Any]]:
    lines = (job.run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_weight_0_is_the_run_without_it(open_tiny: Any) -> None:
    """No hook is registered, and the weights are the same bit for bit, dropout and all."""
    without, at_0 = open_tiny(run="without"), open_tiny(contrastive={"weight": 0.0}, run="zero")
    assert not any("contrastive" in at_0.hooks.implemented(hook) for hook in names())
    for job in (without, at_0):
        train(job)
    one, other = (dict(job.strategy.model.named_parameters()) for job in (without, at_0))
    assert all(torch.equal(p, other[n]) for n, p in one.items())


def test_the_log_has_both_terms_their_ratio_and_the_share_without_positives(open_tiny: Any) -> None:
    """Terms unweighted; the total is their weighted sum; the ratio at step 1 alone."""
    job = open_tiny({"train.log_every": 1, "train.micro_batch_size": 4}, {"weight": 0.8, "reduction": "sum"})
    train(job)
    first, second = losses(job)
    task, mine = first["loss/task"], first["loss/contrastive"]
    assert first["loss"] == pytest.approx(0.2 * task + 0.8 * mine)
    assert first["contrastive/ratio"] == pytest.approx(0.8 * mine / (0.2 * task))
    assert "contrastive/ratio" not in second
    assert 0 <= first["contrastive/no_positive"] < 1


def test_label_smoothing_stays_the_task_s_own(open_tiny: Any) -> None:
    """The task's term is as without the plugin, whatever it is, times what is left of the weight."""
    smooth = {"task.label_smoothing": 0.1, "train.log_every": 1, "train.steps": 1, **QUIET}
    jobs = [open_tiny(smooth, run="without"), open_tiny(smooth, {"weight": 0.3}, run="with")]
    for job in jobs:
        train(job)
    (without,), (with_it,) = map(losses, jobs)
    assert with_it["loss/task"] == pytest.approx(without["loss"])
    assert with_it["loss"] == pytest.approx(0.7 * without["loss"] + 0.3 * with_it["loss/contrastive"])


def test_a_step_without_positives_has_no_term(open_tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows of two classes: the loss is the task's share, and the run is warned."""
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    job = open_tiny({"train.steps": 2, "train.log_every": 1}, {"weight": 0.5}, rows=rows)
    train(job)
    assert all("loss/contrastive" not in line for line in losses(job))
    assert [line["contrastive/no_positive"] for line in losses(job)] == [1.0, 1.0]
    assert "100% of the rows so far had no other row of their class" in capsys.readouterr().err


def test_a_run_with_positives_is_not_warned(open_tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """And one at weight=1 is told that its head stays as it was drawn."""
    train(open_tiny({"train.steps": 2}, {"weight": 0.5}))
    assert "warning" not in capsys.readouterr().err
    train(open_tiny({"train.steps": 1}, ALONE, run="alone"))
    assert "does not train the classification head" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_loss_is_fp32_whatever_the_precision(open_tiny: Any, precision: str) -> None:
    """Under autocast the term is near that of fp32, and the two passes of `global` agree."""
    options, common = {"batch": "global", "temperature": 0.1}, {"train.log_every": 1, **QUIET}
    job = open_tiny(common | {"train.precision": precision, "train.micro_batch_size": 4}, options)
    train(job)
    reference = open_tiny(common, options, run="reference")
    train(reference)
    for one, other in zip(losses(job), losses(reference), strict=True):
        assert one["loss/contrastive"] == pytest.approx(other["loss/contrastive"], rel=0.02)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_t5"])
@pytest.mark.parametrize("representation", ["auto", "pooled", "mean"])
def test_decoders_and_encoder_decoders_train(open_tiny: Any, kind: str, representation: str) -> None:
    """With gradients for the whole model from the term alone, and gradient checkpointing."""
    overrides = {"model.path": f"ftcore:{kind}", "train.gradient_checkpointing": True, **QUIET}
    found = gradients(open_tiny(overrides, ALONE | {"representation": representation}))
    assert found[next(n for n in found if "embed" in n or "shared" in n)].any()


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(open_tiny: Any) -> None:
    """With the balanced sampler, in the middle of an epoch; nothing has to be saved."""
    overrides = {"train.micro_batch_size": 4, "train.batch_size": 8, "train.save_every": 2, "train.steps": 5}
    options = {"batch": "global", "balance": True}
    whole = open_tiny(overrides, options, run="whole")
    train(whole)
    first = open_tiny(overrides, options, run="parts")
    first.hooks.on_train_start(first.state(5))
    for first.progress.step in (0, 1):
        run_step(first, sampler(first), 5)
    first.progress.step = 2
    first.save(first.checkpoints / "step-2")
    second = open_tiny(overrides, options, run="parts")
    assert second.progress.step == 2
    train(second)
    one, other = (dict(job.strategy.model.named_parameters()) for job in (whole, second))
    assert all(torch.equal(p, other[n]) for n, p in one.items())


@plugin()
class Again:
    """Makes a second forward before the loss, with another batch's tokens, as adversarial methods do."""

    @hookimpl(wrapper=True)
    def compute_loss(self, batch: Any, step: Any) -> Any:
        terms = yield
        own, batch["input_ids"] = batch["input_ids"], batch["input_ids"].flip(0)
        step.forward(batch)
        batch["input_ids"] = own
        return terms


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_what_is_contrasted_is_of_the_loss_s_own_forward(open_tiny: Any, model: str) -> None:
    """Whether a plugin that makes another forward comes before or after."""
    overrides, options = QUIET | {"model.path": f"ftcore:{model}"}, {"representation": "pooled"}
    expected = gradients(open_tiny(overrides, options, run="without"))
    for first in (True, False):
        job = open_tiny(overrides, options, run=f"first-{first}")
        add(job, Again(), first=first)
        assert_equal(gradients(job), expected)


@plugin()
class Unseeded:
    """Adds noise that is another one in each forward."""

    calls: int = 0

    @hookimpl(wrapper=True)
    def forward(self) -> Any:
        outputs = yield
        self.calls += 1
        last, own = outputs.hidden_states[-1], torch.Generator().manual_seed(self.calls)
        outputs.hidden_states = (
            *outputs.hidden_states[:-1],
            last + 0.3 * torch.randn(last.shape, generator=own),
        )
        return outputs


def test_two_passes_that_differ_are_an_error(open_tiny: Any) -> None:
    """A wrapper whose draws the seeds don't govern would make the gradient wrong: no step is made."""
    job = open_tiny({"train.micro_batch_size": 8}, {"batch": "global"})
    add(job, Unseeded())
    before = [p.detach().clone() for p in job.strategy.model.parameters()]
    job.hooks.on_train_start(job.state(STEPS))
    with pytest.raises(UserError, match="the second gave other representations"):
        run_step(job, sampler(job), STEPS)
    assert all(torch.equal(a, b) for a, b in zip(before, job.strategy.model.parameters(), strict=True))
    micro = open_tiny({"train.micro_batch_size": 8}, run="micro", contrastive={})
    add(micro, Unseeded())
    micro.hooks.on_train_start(micro.state(STEPS))
    run_step(micro, sampler(micro), STEPS)  # one pass: nothing to disagree with


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0.5, 1.0]), r"numbers \(regression\)"),
        (torch.zeros(2, 3), "several labels a row"),
        (torch.zeros(2, 3, dtype=torch.int64), "several labels a row"),
        (torch.tensor([0, 1, 1]), "several labels a row"),
    ],
    ids=["regression", "multi-label", "tokens", "packed"],
)
def test_labels_that_are_no_class_of_a_row_are_refused(open_tiny: Any, labels: Any, says: str) -> None:
    """Whatever task or plugin made the batch; a packed row with several segments included."""
    job = open_tiny(contrastive={})
    batch = Batch({"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": labels})
    with pytest.raises(UserError, match=f"one class a row, and this task has {says}"):
        job.hooks.on_step_start(job.strategy.model, [batch], None)


@pytest.mark.parametrize(
    ("overrides", "options", "says"),
    [
        ({}, {"weight": 1.1}, r"weight must be in \[0, 1\], got 1.1"),
        ({}, {"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({}, {"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({}, {"representation": "pooled", "layer": 1}, "layer=1 has no effect with representation=pooled"),
        ({}, {"representation": "cls"}, "plugin.contrastive.representation must be one of auto, first_token"),
        (
            {"task.name": "causal_lm", "model.path": "ftcore:tiny_llama"},
            {},
            "needs one label a row, task=causal_lm",
        ),
        ({"train.micro_batch_size": 1}, {}, "nothing to be contrasted with; use plugin.contrastive.batch="),
        ({"train.batch_size": 1}, {"batch": "global"}, "contrasted with; raise train.batch_size"),
        ({}, {"layer": 7}, r"layer must be in \[-3, 2\]"),
        ({"train.batch_size": 9}, {"balance": True}, r"balance needs an even train\.batch_size, got 9"),
        ({"train.micro_batch_size": 3}, {"balance": True}, r"even train\.micro_batch_size, got 3"),
        ({"model.path": "ftcore:tiny_llama"}, {"representation": "first_token"}, "use last_token or mean"),
    ],
)
def test_mistakes_are_refused(open_tiny: Any, overrides: Any, options: Any, says: str) -> None:
    """By name, rule and value, before a step is made."""
    with pytest.raises(UserError, match=says):
        train(open_tiny(overrides, options))
