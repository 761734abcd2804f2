"""Training with mixout, against a step written by hand, and equal however it is run."""

import gc
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ftcore import Step, UserError, hookimpl, plugin
from ftcore.batches import micro_batches
from ftcore.contract import Sampler
from ftcore.defaults import Defaults
from ftcore.hooks import Hooks
from ftcore.loop import run_step, train
from ftcore.optim import lr_factor
from ftcore.plugins import Enabled
from ftcore.probe import extra as enabled
from ftcore.results import describe_run, export
from ftcore_mixout._mask import draw, mask_key

STEPS = 3
CPU = torch.device("cpu")
QUIET = {"model.dropout": 0.0}
Jobs = Callable[..., Any]


def sampler(job: Any) -> Sampler:
    chosen: Sampler = job.hooks.build_sampler(
        job.prepared.splits["train"], job.cfg.train.batch_size, job.cfg.seed
    )
    return chosen


def steps(job: Any, count: int = STEPS) -> list[float]:
    """Train `count` steps; the gradient norms."""
    chosen, norms = sampler(job), []
    if job.progress.step == 0:
        job.hooks.on_train_start(job.state(STEPS))
    job.strategy.model.train()
    for _ in range(count):
        norms.append(float(run_step(job, chosen, STEPS)["grad_norm"]))
        job.progress.step += 1
    return norms


def weights(job: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.strategy.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def naive_mask(job: Any, name: str, shape: Any, number: int, p: float, column: bool) -> torch.Tensor:
    """A weight's mask, filled in by hand."""
    mask, key = torch.empty(shape), mask_key(job.cfg.seed, job.progress.step, number, name)
    drawn = draw(key, p, 0, mask.numel(), CPU) > 0
    for i, j in itertools.product(*map(range, shape)):
        mask[i, j] = float(drawn[j] if column else drawn[i * shape[1] + j])
    return mask


def naive_gradients(job: Any, w: Any, u: Any, p: float, column: bool, per_micro_batch: bool) -> Any:
    """Gradients of a step by autograd through mixtures of copies of the weights."""
    chosen, total = sampler(job), {name: torch.zeros_like(value) for name, value in w.items()}
    epoch, within = divmod(job.progress.step, chosen.steps_per_epoch)
    batches = micro_batches(job, chosen(epoch, within), epoch)
    rows = sum(len(batch["labels"]) for batch in batches)
    for batch in batches:
        number = batch.micro_batch if per_micro_batch else -1
        leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
        mixed = dict(leaves)
        for name, target in u.items():
            m = naive_mask(job, name, target.shape, number, p, column)
            mixed[name] = ((1 - m) * target + m * leaves[name] - p * target) / (1 - p)
        labels = batch.pop("labels")
        logits = functional_call(job.strategy.model, mixed, (), dict(batch)).logits
        found = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum") / rows, [*leaves.values()])
        for name, grad in zip(leaves, found, strict=True):
            total[name] += grad
    return total


@pytest.mark.parametrize("granularity", ["column", "element"])
@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
@pytest.mark.parametrize(("target", "decay"), [("pretrained", 0.0), ("pretrained", 0.3), ("zero", 0.0)])
def test_it_trains_as_a_step_by_hand(
    open_tiny: Jobs, granularity: str, mask_scope: str, target: str, decay: float
) -> None:
    """Three steps of two micro-batches: gradients, clipping, AdamW, both decays."""
    options = {"p": 0.4, "granularity": granularity, "mask_scope": mask_scope, "target": target}
    job = open_tiny({"train.micro_batch_size": 4, **QUIET}, {**options, "decay": decay}, run="mixout")
    hand = open_tiny({"train.micro_batch_size": 4, **QUIET}, run="hand")
    names = describe_run(job)["plugins"][0]["describes"]["mixed"]
    w = weights(hand)
    u = {name: torch.zeros_like(w[name]) if target == "zero" else w[name].clone() for name in names}
    moments: dict[str, Any] = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in w.items()}
    job.hooks.on_train_start(job.state(STEPS))
    for index in range(1, STEPS + 1):
        grads = naive_gradients(hand, w, u, 0.4, granularity == "column", mask_scope == "micro_batch")
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        lr = job.cfg.optim.lr * lr_factor(job.cfg.optim, index - 1, STEPS)
        for name, grad in grads.items():
            grad *= min(1.0, 1.0 / float(norm))
            if decay and name in u:
                w[name] -= lr * decay * (w[name] - u[name])
            elif w[name].ndim > 1:
                w[name] -= lr * job.cfg.optim.weight_decay * w[name]
            m, v = moments[name]
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            w[name] -= lr * (m / (1 - 0.9**index)) / ((v / (1 - 0.999**index)).sqrt() + 1e-8)
        assert float(run_step(job, sampler(job), STEPS)["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
        job.progress.step = hand.progress.step = index
    for name, value in weights(job).items():
        # Adam divides by gradients next to 0: single elements are as exact as their sign.
        off = (value - w[name]).abs() > 1e-5
        assert float(off.float().mean()) < 0.002, name


def test_at_p_0_it_is_the_run_without_it(open_tiny: Jobs) -> None:
    """Bit for bit, dropout and all: no hook is there."""
    without, at_0 = open_tiny(run="without"), open_tiny(mixout={"p": 0.0}, run="zero")
    assert not any("mixout" in at_0.hooks.implemented(hook) for hook in hook_names())
    assert steps(without) == steps(at_0)
    assert same(weights(without), weights(at_0))


def hook_names() -> list[str]:
    from ftcore.hookspecs import names

    return list(names())


def test_without_decay_it_asks_for_no_shards(open_tiny: Jobs) -> None:
    """`on_gradients` would cost two ranks a sum over all weights each step."""
    assert open_tiny(QUIET, {"p": 0.5}).hooks.implemented("on_gradients") == []
    decayed = open_tiny(QUIET, {"p": 0.0, "decay": 0.1}, run="decayed")
    assert decayed.hooks.implemented("on_gradients") == ["mixout"]


def test_decay_alone_leaves_forward_and_dropout_as_they_are(open_tiny: Jobs) -> None:
    """p=0 with decay is the paper's wdecay(w_pre): no mask, dropout on, the head decays to zero."""
    plain, job = open_tiny(run="plain"), open_tiny(mixout={"p": 0.0, "decay": 0.5}, run="decay")
    assert steps(plain, 1) == steps(job, 1)
    names = {id(p): n for n, p in job.strategy.model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in job.strategy.optimizer.param_groups
        for p in group["params"]
    }
    assert decays["classifier.weight"] == job.cfg.optim.weight_decay
    assert decays["bert.pooler.dense.weight"] == 0


@plugin()
class Slower:
    """Half the rate for one weight, as a plugin with a rate per layer has it."""

    @hookimpl
    def param_options(self, name: str) -> dict[str, float] | None:
        return {"lr_scale": 0.5} if name == "bert.pooler.dense.weight" else None


def test_decay_goes_by_the_rate_of_each_weight(open_tiny: Jobs) -> None:
    """AdamW's decay is the weight's own rate times `decay`; so is the one that takes its place."""
    mixout = {"p": 0.0, "decay": 0.3}
    job = open_tiny(QUIET, mixout, extra=[enabled("slower", Slower())])
    job.hooks.on_train_start(job.state(3))
    shards = {shard.name: shard for shard in job.strategy.shards()}
    halved, other = shards["bert.pooler.dense.weight"], shards["bert.encoder.layer.0.output.dense.weight"]
    for shard in (halved, other):
        shard.value += 1.0  # so far from the pretrained value
    before = {s.name: s.value.clone() for s in (halved, other)}
    job.hooks.on_gradients(list(shards.values()), 0.1, Step(index=0, total=3, epoch=0, seed=0))
    for shard, rate in ((halved, 0.05), (other, 0.1)):
        assert torch.allclose(shard.value, before[shard.name] - rate * 0.3, atol=1e-6)


def test_control_is_the_run_without_it_at_the_rate_it_amounts_to(open_tiny: Jobs) -> None:
    """No mask, dropout on; the rate of the weights that would be mixed is times sqrt(1 - p), no other's."""
    plain, job = open_tiny(run="plain"), open_tiny(mixout={"p": 0.7, "control": True}, run="control")
    mixed = describe_run(job)["plugins"][0]["describes"]["mixed"]
    assert steps(plain, 1) == steps(job, 1)
    names = {id(p): n for n, p in job.strategy.model.named_parameters()}
    for group in job.strategy.optimizer.param_groups:
        scales = {names[id(p)] in mixed for p in group["params"]}
        assert group["lr_scale"] == pytest.approx(0.3**0.5 if scales == {True} else 1.0)
        assert len(scales) == 1
    assert mixed
    at_0 = open_tiny(mixout={"p": 0.0, "control": True}, run="zero")
    assert not any("mixout" in at_0.hooks.implemented(hook) for hook in hook_names())


SPLITS: dict[str, dict[str, Any]] = {
    "accumulated": {"train.micro_batch_size": 2},
    "checkpointing": {"train.micro_batch_size": 4, "train.gradient_checkpointing": True},
}


@pytest.mark.parametrize("granularity", ["column", "element"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_mask_of_the_step_does_not_depend_on_the_split(
    open_tiny: Jobs, granularity: str, split: str
) -> None:
    """Gradient norms under accumulation and checkpointing are those of one micro-batch."""
    mixout = {"p": 0.7, "granularity": granularity}
    whole = steps(open_tiny(QUIET, mixout))
    assert steps(open_tiny(QUIET | SPLITS[split], mixout, run=split)) == pytest.approx(whole, rel=1e-5)
    assert steps(open_tiny(QUIET, run="without")) != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_sees_the_same_mixture(open_tiny: Jobs, mask_scope: str, reentrant: bool) -> None:
    """Both modes of gradient checkpointing give the gradients of none."""
    overrides = {"train.micro_batch_size": 4, **QUIET}
    mixout = {"p": 0.7, "mask_scope": mask_scope}
    plain, job = open_tiny(overrides, mixout), open_tiny(overrides, mixout, run="recomputed")
    model = job.strategy.model
    name = "activation_checkpointing_enable"  # since transformers 5.24
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(
        {"use_reentrant": reentrant}
    )
    model.enable_input_require_grads()  # or a reentrant segment has no gradient
    assert steps(job) == pytest.approx(steps(plain), rel=1e-5)


def test_a_mask_of_each_micro_batch_is_another(open_tiny: Jobs) -> None:
    """Two micro-batches under one mask and under two have different gradients."""
    norms = [
        steps(open_tiny(QUIET | {"train.micro_batch_size": 4}, {"p": 0.7, "mask_scope": scope}, run=scope))
        for scope in ("step", "micro_batch")
    ]
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(open_tiny: Jobs, mask_scope: str) -> None:
    """Masks, target and decay go on as if nothing had been."""
    overrides = {"train.micro_batch_size": 4, "train.save_every": 2, "train.steps": 5}
    mixout = {"p": 0.6, "mask_scope": mask_scope, "decay": 0.1}
    whole = open_tiny(overrides, mixout, run="whole")
    train(whole)
    first = open_tiny(overrides, mixout, run="parts")
    steps(first, 2)
    first.save(first.checkpoints / "step-2")
    second = open_tiny(overrides, mixout, run="parts")
    assert second.progress.step == 2
    train(second)
    assert same(weights(whole), weights(second))


def test_resuming_with_another_target_is_refused(open_tiny: Jobs, tmp_path: Any) -> None:
    """The model's files have changed since: it says so, rather than mix with something else."""
    base = open_tiny(run="base")
    base.strategy.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    overrides = {"model.path": str(tmp_path / "base")}
    job = open_tiny(overrides, {"p": 0.5})
    steps(job, 1)
    job.save(job.checkpoints / "step-1")
    assert open_tiny(overrides, {"p": 0.5}).progress.step == 1
    with torch.no_grad():
        base.strategy.model.bert.pooler.dense.weight[0, 0] += 1e-3
    base.strategy.model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="not those that this run began with"):
        open_tiny(overrides, {"p": 0.5})


@plugin()
class Watch:
    """Sees the weights in each phase of a step, and adds a penalty on them."""

    def __post_init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    @hookimpl(trylast=True)
    def on_step_start(self, model: Any) -> None:
        self.seen["mixed"] = model.bert.pooler.dense.weight.detach().clone()

    @hookimpl
    def regularize(self, shards: Any) -> dict[str, torch.Tensor]:
        self.seen |= {s.name: s.value.detach().clone() for s in shards}
        return {"l2": sum(s.value.square().sum() for s in shards)}

    @hookimpl
    def on_gradients(self, shards: Any) -> None:
        for shard in shards:
            assert torch.equal(shard.value, self.seen[shard.name])


def test_weights_are_mixed_in_the_forwards_alone(open_tiny: Jobs) -> None:
    """Other plugins' `regularize` and `on_gradients`, and what follows, have the weights bit for bit."""
    job, watch = open_tiny(QUIET, {"p": 0.7}), Watch()
    enabled = Enabled(name="watch", instance=watch, distribution="", version="0", options={})
    job.hooks = Hooks(Defaults(job.cfg), [*job.hooks.plugins, enabled], job.cfg)
    steps(job, 2)
    before, places = weights(job), {n: p.data_ptr() for n, p in job.strategy.model.named_parameters()}
    run_step(job, sampler(job), STEPS)
    assert all(torch.equal(watch.seen[name], value.view(-1)) for name, value in before.items())
    assert not torch.equal(watch.seen["mixed"], before["bert.pooler.dense.weight"])
    assert {n: p.data_ptr() for n, p in job.strategy.model.named_parameters()} == places


def live_bytes() -> int:
    """Bytes of every tensor storage that Python can reach."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("granularity", ["column", "element"])
@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
def test_it_keeps_the_target_and_one_more_copy(open_tiny: Jobs, granularity: str, mask_scope: str) -> None:
    """No mask, nothing per micro-batch: twice the mixed weights in all, once they are training."""
    job = open_tiny(QUIET)
    steps(job, 1)
    before = live_bytes()
    more = open_tiny(QUIET, run="again")
    steps(more, 1)
    plain, before = live_bytes() - before, live_bytes()
    mixed = open_tiny(QUIET, {"p": 0.7, "granularity": granularity, "mask_scope": mask_scope}, run="mixed")
    steps(mixed, 1)
    size = 4 * describe_run(mixed)["plugins"][0]["describes"]["mixed_parameters"]
    slack = 16_384  # numbers of a step
    assert live_bytes() - before - plain <= 2 * size + slack < 3 * size


def test_bf16_mixes_in_fp32(open_tiny: Jobs) -> None:
    """Under autocast the mixture is of fp32 weights, so a small step from the target is not lost."""
    job = open_tiny({"train.precision": "bf16", **QUIET}, {"p": 0.5})
    before = weights(job)
    norms = steps(job)
    assert norms == pytest.approx(steps(open_tiny(QUIET, {"p": 0.5}, run="fp32")), rel=0.05)
    assert all(p.dtype == torch.float32 for p in job.strategy.model.parameters())
    assert not same(before, weights(job))


def test_the_export_is_the_plain_model(open_tiny: Jobs) -> None:
    """transformers alone loads it and gives the logits of evaluation exactly; its dropout is as it was."""
    import transformers

    job = open_tiny(mixout={"p": 0.7})
    steps(job)
    export(job, {})
    folder = job.run_dir / "model"
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(3, 200, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, job.strategy.model.eval()(ids).logits)
    assert json.loads((folder / "config.json").read_text())["hidden_dropout_prob"] == 0.1


def test_the_manifest_is_in_run_json(open_tiny: Jobs) -> None:
    """What is mixed, how much of the model that is, which dropout is off."""
    manifest = describe_run(open_tiny(mixout={"include": ["*.query.weight"]}))["plugins"][0]["describes"]
    assert manifest == {
        "mixed": [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)],
        "mixed_parameters": 2048,
        "kept_parameters": 4096,  # the target, and the weights as they are while masks act
        "share_of_parameters": pytest.approx(0.05, abs=0.01),
        "dropout_off": [f"bert.encoder.layer.{i}.attention.self.dropout" for i in (0, 1)],
    }


@pytest.mark.parametrize("mask_scope", ["step", "micro_batch"])
def test_weights_that_are_frozen_later_are_refused(open_tiny: Jobs, mask_scope: str) -> None:
    """The manifest would name them, and their block's dropout would be off for nothing."""
    job = open_tiny(mixout={"mask_scope": mask_scope})
    job.strategy.model.bert.pooler.dense.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"froze bert\.pooler\.dense\.weight after .* before mixout"):
        job.hooks.on_train_start(job.state(STEPS))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
        ({"decay": -1.0}, "decay must be at least 0 and finite, got -1.0"),
        ({"decay": float("nan")}, "decay must be at least 0 and finite, got nan"),
        ({"exclude": ["*"]}, "no pretrained linear layer to mix in this model: plugin.mixout.exclude leaves"),
        ({"decay": 0.1, "target": "zero"}, "with target=zero use optim.weight_decay"),
        ({"decay": 0.1, "control": True}, "control is the run without mixout"),
        ({"granularity": "row"}, "plugin.mixout.granularity must be one of column, element"),
        ({"mask_scope": "epoch"}, "plugin.mixout.mask_scope must be one of step, micro_batch"),
    ],
)
def test_bad_options_are_refused(open_tiny: Jobs, options: dict[str, Any], says: str) -> None:
    """By name, rule and value."""
    with pytest.raises(UserError, match=says):
        open_tiny(mixout=options)
