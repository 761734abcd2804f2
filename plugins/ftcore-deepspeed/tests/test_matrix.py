"""One loss and gradient norm for every strategy, split and set of techniques that are installed.

Here each set of techniques meets each strategy, and both meet each split (pairwise); `make matrix` runs every
combination, 20 steps long.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftcore.compose import compose
from ftcore.plugins import installed

from .cases import ROWS, run_case, trajectory

FULL = bool(os.environ.get("FTCORE_MATRIX"))
STEPS = 20 if FULL else 6
TECHNIQUES = {
    "none": [],
    "mixout": ["mixout"],
    "contrastive": ["contrastive"],
    "instruct": ["instruct"],
    "mixout+contrastive": ["mixout", "contrastive"],
    "mixout+instruct": ["mixout", "instruct"],
}
OPTIONS = {
    "mixout": ["plugin.mixout.p=0.5"],
    "contrastive": ["plugin.contrastive.batch=global"],
    "instruct": ["plugin.instruct.pack=true", "plugin.instruct.overlap=off", "data.max_length=64"],
}
PRESENT = [name for name, plugins in TECHNIQUES.items() if set(plugins) <= set(installed())]
STRATEGIES = ["trainer=ddp", *(f"trainer=deepspeed trainer.stage={stage}" for stage in range(4))]
RANKS = (1, 2)
ACCUMULATION = (1, 2, 4)


def chosen() -> list[tuple[str, str, int, int]]:
    """(techniques, strategy, ranks, accumulation): all, or each pair of techniques and strategy in turn."""
    if FULL:
        return list(itertools.product(PRESENT, STRATEGIES, RANKS, ACCUMULATION))
    pairs = list(itertools.product(PRESENT, STRATEGIES))
    splits = list(itertools.product((2, 2, 1), ACCUMULATION))
    return [(*pair, *splits[i % len(splits)]) for i, pair in enumerate(pairs)]


def name(case: tuple[Any, ...]) -> str:
    return "-".join(
        str(part).replace("trainer.", "").replace("trainer=", "").replace(" ", "-") for part in case
    )


def config(folder: Path, techniques: str, strategy: str, micro: int) -> dict[str, Any]:
    """The composed config: 8 rows a step, in micro-batches of `micro` rows."""
    plugins = TECHNIQUES[techniques]
    data = folder / ("chat" if "instruct" in plugins else "rows")
    overrides = [
        "model=tiny_llama" if "instruct" in plugins else "model=tiny_bert",
        *(["+plugin=[" + ",".join(plugins) + "]"] if plugins else []),
        *(option for plugin in plugins for option in OPTIONS[plugin]),
        *strategy.split(),
        f"data.train={data}.jsonl",
        "data=files",
        f"train.steps={STEPS}",
        f"train.micro_batch_size={micro}",
        "train.batch_size=8",
        "train.log_every=1",
        "model.dropout=0",
        "optim.lr=1e-3",
        "seed=4",
    ]
    return dataclasses.asdict(compose(overrides))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Path:
    """Every case, and one process with all 8 rows in a micro-batch for each set of techniques."""
    folder = tmp_path_factory.mktemp("matrix")
    chats = [
        {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
        for r in ROWS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    for techniques in PRESENT:
        run_case(folder, techniques, {"config": config(folder, techniques, "trainer.device=cpu", 8)})
    for ranks in RANKS:
        run_ranks(
            folder,
            ranks,
            {
                name(case): {"config": config(folder, case[0], case[1], 8 // (ranks * case[3]))}
                for case in chosen()
                if case[2] == ranks
            },
        )
    return folder


@pytest.mark.parametrize("case", chosen(), ids=name)
def test_it_is_the_trajectory_of_one_process(ran: Path, case: tuple[str, str, int, int]) -> None:
    """Losses and gradient norms of every step, within 1e-4."""
    whole = trajectory(ran, case[0])
    assert len(whole) == 2 * STEPS
    assert trajectory(ran, name(case)) == pytest.approx(whole, rel=1e-4)
