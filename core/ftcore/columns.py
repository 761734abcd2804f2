"""Which column is what, where nobody said: by the usual names, else by what the columns hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftcore.errors import UserError

__all__ = ["guess", "is_missing", "text"]

NAMES = {
    "text": (
        "text, sentence, content, message, body, review, comment, tweet, utterance, query, question, prompt,"
        " input, document, article, review_text, full_text, premise, sentence1, text1, text_a, question1,"
        " description, abstract, headline, title"
    ),
    "label": (
        "label, labels, class, category, target, intent, sentiment, topic, tag, emotion, polarity, rating,"
        " stars, score, y"
    ),
    "target": (
        "target, output, response, answer, completion, summary, translation, highlights, reference, label"
    ),
}
"""The usual names, the most usual first; compared without regard to case."""

PAIRS = {
    "premise": "hypothesis",
    "sentence1": "sentence2",
    "text1": "text2",
    "text_a": "text_b",
    "question1": "question2",
}
NEEDED = {
    "classify": ("label", "text"),
    "causal_lm": ("text",),
    "seq2seq": ("target", "text"),
    "auto": ("text",),
}


def text(value: Any, column: str) -> str:
    """A value as the text it stands for; a missing one is empty.

    Raises:
        UserError: a list, a mapping or other value that is no text, or bytes that are no UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UserError(f"column '{column}' holds bytes that are no UTF-8 text") from None
    if not isinstance(value, str | int | float | bool):
        raise UserError(f"column '{column}' holds a {type(value).__name__}, which is no text")
    return str(value)


def is_missing(label: Any) -> bool:
    """Whether a label is none: null, or blank text."""
    return label is None or (isinstance(label, str) and not label.strip())


def guess(
    task: str,
    columns: Mapping[str, str | None],
    fixed: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Column names for the keys of `data.columns` that `task` needs and the data lack.

    Args:
        columns: the names as configured.
        fixed: the keys that the user set; they are never guessed.
        rows: the first rows, all with the same columns.

    Returns:
        What to change; empty where nothing is missing or nothing fits.
    """
    there = list(rows[0])
    missing = [k for k in NEEDED.get(task, ()) if columns[k] not in there and k not in fixed]
    free = [name for name in there if name not in columns.values()]
    found: dict[str, str] = {}
    for key in missing:
        if name := _by_name(NAMES[key].split(", "), free):
            found[key] = name
            free.remove(name)
    if task == "classify":
        for key, by_content in (("label", _label), ("text", _text)):
            if key in missing and key not in found and (name := by_content(free, rows)):
                found[key] = name
                free.remove(name)
        second = PAIRS.get(found.get("text", "").lower(), "")
        if columns["text_pair"] is None and "text_pair" not in fixed and (name := _by_name([second], free)):
            found["text_pair"] = name
    return found


def _by_name(usual: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    return next((plain[name] for name in usual if name in plain), None)


def _label(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The only column whose few values come again and again; None where several could be it."""
    able = []
    for name in names:
        values = [row[name] for row in rows if row[name] is not None]
        plain = all(isinstance(v, (str, int)) and len(str(v)) <= 60 for v in values)
        if plain and 2 <= len(set(values)) <= min(100, len(values) / 2):
            able.append(name)
    return able[0] if len(able) == 1 else None


def _text(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column with the longest texts."""
    lengths = {name: sum(len(v) for row in rows if isinstance(v := row[name], str)) for name in names}
    best = max(names, key=lambda name: lengths[name], default=None)
    return best if best is not None and lengths[best] else None
