"""`ftcore evaluate`: the figures of a trained model, on its run's data or on other data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftcore.commands import Parser
from ftcore.errors import UserError

if TYPE_CHECKING:
    from ftcore.screen import Screen

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Print the metrics; of a run on its own data, also whether they are those of `result.json`."""
    parser = Parser(
        prog="ftcore evaluate",
        description="Evaluate a run (on its validation and test data) or a model, or either on a file.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's directory, a model's, or a hub id")
    parser.add_argument(
        "settings", nargs="*", default=[], help="data=FILE (with labels), data.columns.text=NAME, ..."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from ftcore.evaluation import predict, score
    from ftcore.saved import open_saved, ready
    from ftcore.screen import Screen

    files = [s.removeprefix("data=") for s in options.settings if s.startswith("data=")]
    settings = [s for s in options.settings if not s.startswith("data=")]
    saved = open_saved(options.model, settings)
    if not files and saved.run is None:
        raise UserError(f"{options.model} is a model, no run: say on which data, data=FILE")
    job = ready(saved, Screen(shown=True, stderr=True), files[-1] if files else None)
    splits = [split for split in job.prepared.splits if split != "train"]
    if not splits:
        raise UserError(f"{options.model} was trained without validation or test data: say data=FILE")
    metrics: dict[str, float] = {}
    for split in splits:
        # As they are: averaging, where the run did it, is in the weights.
        predictions = predict(job, split) or {}
        metrics |= score(job, predictions, split, {"validation": "eval"}.get(split, split))
    if options.json:
        print(json.dumps(metrics, indent=2))
        return 0
    screen = Screen(shown=True)
    screen.table(metrics)
    if saved.result is not None and not options.settings:
        _compare(screen, metrics, saved.result["metrics"])
    return 0


def _compare(screen: Screen, now: dict[str, float], then: dict[str, float]) -> None:
    """Say whether a run's figures came out again, to the last digit."""
    different = [f"{k}: {then.get(k)} there, {v} now" for k, v in now.items() if then.get(k) != v]
    if different:
        screen.line(
            f"warning: {len(different)} of {len(now)} figures are not those of result.json"
            f" ({'; '.join(different[:3])}); other data, hardware or versions?"
        )
    else:
        screen.line("equal to result.json, to the last digit")
