"""Strategies: who owns what, sums over real ranks, clipping, precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore import UserError
from ftcore.config import Config, TrainConfig, TrainerConfig
from ftcore.strategies import Single, local_ranks

RANK = """
import json, sys
from pathlib import Path
import torch
from ftcore.config import Config, TrainerConfig
from ftcore.strategies import DDP

strategy = DDP(Config(trainer=TrainerConfig(strategy="ddp", device="cpu")))
torch.manual_seed(strategy.rank)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))  # 12, 3, 3 and 1 elements
strategy.prepare(model, lambda m: torch.optim.SGD(m.parameters()))
report = {"start": [p.flatten().tolist() for p in model.parameters()]}
strategy.keep_pretrained({"0.weight": torch.arange(12.0)})
report["pretrained"] = [None if s.pretrained is None else s.pretrained.tolist() for s in strategy.shards()]
x = torch.arange(4.0).view(1, 4) * (1 + strategy.rank)
strategy.backward(model[0](x).sum())  # the last layer has no gradient on any rank
strategy.finish_gradients()
report["grad"] = [p.grad.flatten().tolist() for p in model.parameters()]
shards = strategy.shards()
report["shards"] = [[s.name, list(s.shape), s.offset, s.value.numel()] for s in shards]
for shard in shards:  # each writes its own part
    shard.value.copy_(torch.arange(shard.value.numel()) + shard.offset)
    shard.grad.fill_(strategy.rank)
strategy.sync_shards()
report["value"] = [p.flatten().tolist() for p in model.parameters()]
report["synced"] = [p.grad.flatten().tolist() for p in model.parameters()]
report["norm"] = float(strategy.clip(None))
report["sum"] = strategy.all_sum([1, strategy.rank])
report["gather"] = strategy.gather({"rank": strategy.rank})
report["broadcast"] = strategy.broadcast(f"from {strategy.rank}")
Path(sys.argv[1], f"{strategy.rank}.json").write_text(json.dumps(report))
strategy.close()
"""


@pytest.fixture(scope="module")
def ranks(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three gloo ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(RANK, 3, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_ranks_start_from_the_weights_of_rank_zero(ranks: Any) -> None:
    """Whatever each drew, all train the same model."""
    assert ranks[0]["start"] == ranks[1]["start"] == ranks[2]["start"]


def test_gradients_are_summed_over_ranks_not_averaged(ranks: Any) -> None:
    """Inputs 1, 2 and 3 times x give 6 times its gradient; a parameter without one has zeros."""
    weight, bias, *last = ranks[0]["grad"]
    assert weight == [0.0, 6.0, 12.0, 18.0] * 3
    assert bias == [3.0] * 3
    assert last == [[0.0] * 3, [0.0]]
    assert ranks[0]["grad"] == ranks[1]["grad"] == ranks[2]["grad"]


def test_each_element_is_owned_by_exactly_one_rank(ranks: Any) -> None:
    """Shards of three ranks cover every parameter once, one that three does not divide included."""
    sizes = {"0.weight": 12, "0.bias": 3, "1.weight": 3, "1.bias": 1}
    for name, size in sizes.items():
        parts = [shard for rank in ranks for shard in rank["shards"] if shard[0] == name]
        owned = [i for _, _, offset, count in parts for i in range(offset, offset + count)]
        assert sorted(owned) == list(range(size))
        assert len(parts) == 3


def test_pretrained_values_are_sharded_like_the_weights(ranks: Any) -> None:
    """Each rank has its own slice; a parameter that was not loaded has none."""
    weight = [rank["pretrained"][0] for rank in ranks]
    assert [*weight[0], *weight[1], *weight[2]] == list(range(12))
    assert [len(part) for part in weight] == [4, 4, 4]
    assert all(rank["pretrained"][1:] == [None, None, None] for rank in ranks)


def test_what_ranks_write_into_their_shards_is_known_to_all(ranks: Any) -> None:
    """After `sync_shards` values and gradients are the union of the ranks' parts, on all of them."""
    assert ranks[0]["value"] == [[float(i) for i in range(n)] for n in (12, 3, 3, 1)]
    assert ranks[0]["synced"][0] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    for key in ("value", "synced", "norm"):
        assert ranks[0][key] == ranks[1][key] == ranks[2][key]


def test_numbers_and_objects_travel(ranks: Any) -> None:
    """Sums, gathered objects in rank order, and rank 0's broadcast, the same on all ranks."""
    for rank in ranks:
        assert rank["sum"] == [3, 3]
        assert rank["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert rank["broadcast"] == "from 0"


def single(**train: Any) -> Single:
    """One process with a small model of which one parameter is frozen and none contiguous."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].weight.data = torch.randn(4, 3).t()
    model[1].bias.requires_grad_(False)
    strategy = Single(Config(trainer=TrainerConfig(device="cpu"), train=TrainConfig(**train)))
    strategy.prepare(model, lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0))
    return strategy


def test_single_owns_each_trainable_parameter_whole() -> None:
    """Shards are views of the flat parameters: writing into one changes the model."""
    strategy = single()
    shards = strategy.shards()
    assert [(s.name, s.shape, s.offset, s.value.numel()) for s in shards] == [
        ("0.weight", (3, 4), 0, 12),
        ("0.bias", (3,), 0, 3),
        ("1.weight", (2, 3), 0, 6),
    ]
    shards[0].value.fill_(2.0)
    assert torch.equal(strategy.model[0].weight, torch.full((3, 4), 2.0))
    assert shards[0].grad is None


def test_clipping_scales_to_the_norm_and_returns_that_of_before() -> None:
    """Against the norm of all gradients as one vector; null does not clip, a small norm is left."""
    strategy = single()
    strategy.backward(strategy.model(torch.ones(2, 4)).square().sum())
    strategy.finish_gradients()
    flat = torch.cat([s.grad for s in strategy.shards()]).double()
    norm = float(torch.sqrt((flat * flat).sum()))
    for limit, expected in ((None, norm), (2 * norm, norm), (norm / 4, norm / 4)):
        assert float(strategy.clip(limit)) == pytest.approx(norm, rel=1e-5)
        after = torch.cat([s.grad for s in strategy.shards()]).double()
        assert float(after.norm()) == pytest.approx(expected, rel=1e-4)


def test_bf16_computes_in_half_and_keeps_weights_and_gradients_whole() -> None:
    """Autocast is on wherever the model is called; parameters and gradients stay fp32."""
    strategy = single(precision="bf16")
    output = strategy.model(torch.ones(2, 4))
    assert output.dtype == torch.bfloat16
    strategy.backward(output.float().sum())
    strategy.finish_gradients()
    assert {(s.value.dtype, s.grad.dtype) for s in strategy.shards()} == {(torch.float32, torch.float32)}


def test_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt device names those there are; local ranks follow the option."""
    with pytest.raises(UserError, match=r"trainer\.device=cpuu is not there; this machine has .*cpu"):
        Single(Config(trainer=TrainerConfig(device="cpuu")))
    assert local_ranks("single", None) == 1
