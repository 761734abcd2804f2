"""`ftcore preview`: formatted rows as the model will see them, trained tokens marked, and the audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ftcore.commands import Parser, parse_run
from ftcore.errors import UserError

__all__ = ["main", "marked"]

TRAINED, IGNORED = "bold green", -100


def main(arguments: Sequence[str]) -> int:
    """Show the first rows of a split after formatting, whatever plugin formats them."""
    parser = Parser(
        prog="ftcore preview",
        description="Show formatted rows: what is read, what is trained, and the audit of all data.",
    )
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--rows", type=int, default=3, help="how many")
    options = parse_run(parser, arguments)
    from ftcore.compose import compose
    from ftcore.job import build_hooks
    from ftcore.prepare import prepare

    cfg = compose(options.overrides)
    hooks = build_hooks(cfg)
    tokenizer = hooks.load_tokenizer()
    prepared = prepare(hooks, tokenizer)
    if options.split not in prepared.splits:
        raise UserError(f"no {options.split} data; there are: {', '.join(prepared.splits)}")
    console = Console(highlight=False, soft_wrap=True)
    rows = prepared.splits[options.split]
    examples = rows.examples
    for number in range(min(options.rows, len(rows))):
        row = rows[number]
        console.print(_heading(row, int(examples[number]), options.split, prepared.labels), style="bold")
        console.print(marked(row, tokenizer, shift=int(cfg.task.name == "causal_lm")))
        console.print()
    if rows.columns.get("labels") == "ints":
        console.print(Text.assemble(("⟦trained⟧", TRAINED), " marks the tokens that carry a loss"))
    for split, audit in prepared.audits.items():
        console.print(Text(audit.describe(split)))
    return 0


def _heading(row: dict[str, Any], example: int, split: str, labels: Sequence[str]) -> Text:
    """Where the row is from, and its columns that are no list."""
    parts = [f"{split} example {example}", f"{len(row['input_ids'])} tokens"]
    for name, value in row.items():
        if name == "labels" and isinstance(value, int) and labels:
            parts.append(f"label {labels[value]}")
        elif name != "row" and isinstance(value, (int, float)):
            parts.append(f"{name} {value}")
    return Text("  ".join(parts))


def marked(row: dict[str, Any], tokenizer: Any, shift: int) -> Text:
    """The row's text, special tokens and all, with the trained parts in marks and in colour.

    Args:
        shift: 1 where a label is predicted from the token before, so that a row's first is not trained.
    """
    ids, labels = row["input_ids"].tolist(), row.get("labels")
    if labels is None or isinstance(labels, int):
        return Text(tokenizer.decode(ids))
    targets = labels.tolist()
    text = Text()
    if shift and len(targets) == len(ids):
        trained = [i >= shift and target != IGNORED for i, target in enumerate(targets)]
        _append(text, ids, trained, tokenizer)
    else:  # an encoder reads, a decoder writes
        text.append(tokenizer.decode(ids) + "\n")
        _append(text, [t for t in targets if t != IGNORED], [True] * len(targets), tokenizer)
    return text


def _append(text: Text, ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> None:
    """Stretches of tokens that are, or are not, trained, each decoded whole."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and trained[end] == trained[start]:
            continue
        part = tokenizer.decode(ids[start:end])
        text.append(f"⟦{part}⟧" if trained[start] else part, TRAINED if trained[start] else "dim")
        start = end
