"""Raw rows of the known formats in one of two shapes: a chat, or a task with its answer.

Knows neither tokens nor templates. A row that can't be trained on raises `BadRow` with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftcore import UserError
from ftcore.columns import guess
from ftcore.config import Columns

__all__ = [
    "FORMATS",
    "RATIONALES",
    "ROLES",
    "STAND_IN",
    "BadRow",
    "Chat",
    "Task",
    "asked",
    "detect",
    "kin",
    "read",
]

FORMATS = ("messages", "sharegpt", "task", "alpaca", "prompt")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
RATIONALES = ("rationale", "cot", "chain_of_thought", "explanation")


STAND_IN = "?"
"""The answer of a row that has none, which nobody reads."""


class BadRow(Exception):
    """A row that can't be trained on; the message is the reason, the same for the same fault."""


@dataclass(kw_only=True)
class Chat:
    """A conversation: messages with `role` and `content` (text), as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(kw_only=True)
class Task:
    """One instance of a task. `verbatim` prompts and answers go through no task template."""

    task: str
    input: str
    target: str
    instruction: str = ""
    targets: list[str] = field(default_factory=list)  # every right answer, `target` first
    choices: list[str] = field(default_factory=list)
    rationale: str = ""
    kin: str = ""  # rows of one kin can be each other's exemplars
    verbatim: bool = False


def detect(row: Mapping[str, Any], text: str, target: str, where: str, *, answered: bool = True) -> str:
    """The format of a source, by the columns of its first row.

    Args:
        text, target: `data.columns.text` and `data.columns.target`: a prompt and its completion, or a chat.
        answered: False where rows may lack their answers.

    Raises:
        UserError: none fits; names the columns there are.
    """
    has = row.keys()
    if _is_named(row, text, target):
        return "messages" if _is_chat(row[text]) else "prompt"
    if any(_is_chat(row.get(c)) for c in ("messages", text, "prompt")):
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if {"input", "target"} <= has:
        return "task"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if _prompt_columns(row, text, target):
        return "prompt"
    if "messages" in has:
        return "messages"
    if not answered and has & {"input", "instruction"}:
        return "task"
    if not answered and any(c in has for c, _ in _pairs(text, target)):
        return "prompt"
    raise UserError(
        f"{where}: no known format has the columns {', '.join(has)}; known: messages | conversations |"
        " instruction, input, target | instruction, output | prompt, completion. Name others by"
        " data.columns.text and data.columns.target"
    )


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(m, Mapping) for m in value)
    )


def _is_named(row: Mapping[str, Any], text: str, target: str) -> bool:
    """Whether a row has the columns that the user named: not the usual names, nor what core guessed."""
    if not (text in row and target in row):
        return False
    if target not in ("target", "output"):
        return True
    return text not in ("text", "input", guess("auto", vars(Columns()), (), [row]).get("text"))


def _pairs(text: str, target: str) -> tuple[tuple[str, str], ...]:
    return ((text, target), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def _prompt_columns(row: Mapping[str, Any], text: str, target: str) -> tuple[str, str] | None:
    return next((p for p in _pairs(text, target) if p[0] in row and p[1] in row), None)


def _chat_column(row: Mapping[str, Any], text: str) -> str | None:
    """The column of a row's messages: the one that was named, else the usual ones."""
    named = [text] if text not in ("text", "prompt") and _is_chat(row.get(text)) else []
    return next((c for c in (*named, "messages", text, "prompt") if row.get(c) is not None), None)


def asked(row: Mapping[str, Any], form: str, text: str, target: str) -> dict[str, Any]:
    """The row with `STAND_IN` for its answer (of a chat, for its last one, which may not be there)."""
    if form == "messages":
        column = _chat_column(row, text) or "messages"
        turns = _without_answer(row.get(column), "role")
        return {**row, column: [*turns, {"role": "assistant", "content": STAND_IN}], "completion": None}
    if form == "sharegpt":
        turns = _without_answer(row.get("conversations"), "from")
        return {**row, "conversations": [*turns, {"from": "gpt", "value": STAND_IN}]}
    if form == "prompt":
        pair = _prompt_columns(row, text, target)
        pair = pair or next((p for p in _pairs(text, target) if p[0] in row), (text, target))
        return {**row, pair[1]: STAND_IN}
    return {**row, "output" if form == "alpaca" else "target": STAND_IN, "targets": None}


def _without_answer(turns: Any, role: str) -> list[dict[str, Any]]:
    """The turns without weights, and without the assistant's at the end."""
    kept = [{k: v for k, v in turn.items() if k != "weight"} for turn in _turns(turns)]
    while kept and SHAREGPT.get(str(kept[-1].get(role, kept[-1].get("role")))) == "assistant":
        kept.pop()
    return kept


def read(row: Mapping[str, Any], form: str, text: str, target: str, source: str) -> Chat | Task:
    """A raw row as a chat or a task. `source` is the task's name where the row has no `task`.

    Raises:
        BadRow: the reason why nothing can be trained on it.
        UserError: the row lacks a column that its format needs.
    """
    try:
        if form == "messages":
            column = _chat_column(row, text)
            if column is None:
                raise BadRow("no messages")
            messages, said = row[column], row.get("completion")
            if _is_chat(said) or (column != "messages" and said is not None):
                answer = _turns(said) if _is_chat(said) else [{"role": "assistant", "content": _text(said)}]
                messages = [*_turns(messages), *answer]
            return _chat(messages, row)
        if form == "sharegpt":
            return _chat([_from_sharegpt(m) for m in _turns(row["conversations"])], row)
        if form == "prompt":
            names = _prompt_columns(row, text, target)
            if names is None:
                raise KeyError(f"{text}' and '{target}")
            said = _text(row[names[1]])
            found = Task(
                task=_name(row, source),
                input=_text(row[names[0]]),
                target=said,
                targets=[said],
                verbatim=True,
            )
        else:
            found = _task(row, "output" if form == "alpaca" else "target", source)
    except KeyError as error:
        raise UserError(
            f"{source}: a row has no column '{error.args[0]}', which the format {form} needs"
        ) from None
    if not found.target.strip():
        raise BadRow("empty answer")
    if not (found.input.strip() or found.instruction.strip()):
        raise BadRow("empty prompt")
    return found


def _name(row: Mapping[str, Any], source: str) -> str:
    return str(row.get("task") or source)


def _text(value: Any) -> str:
    if isinstance(value, list | Mapping):
        raise BadRow(f"a {type(value).__name__} where a text belongs")
    return "" if value is None else str(value)


def _texts(value: Any) -> list[str]:
    """A list of texts; one text is a list of one."""
    return [_text(v) for v in value] if isinstance(value, list | tuple) else [_text(value)] if value else []


def _turns(value: Any) -> Sequence[Mapping[str, Any]]:
    if not _is_chat(value):
        raise BadRow("messages that are no list of turns")
    turns: Sequence[Mapping[str, Any]] = value
    return turns


def _task(row: Mapping[str, Any], answer: str, source: str) -> Task:
    target = _text(row[answer])
    others = [t for t in _texts(row.get("targets")) if t != target]
    return Task(
        task=_name(row, source),
        instruction=_text(row.get("instruction")),
        input=_text(row.get("input")),
        target=target,
        targets=[target, *others],
        choices=_texts(row.get("choices")),
        rationale=next((_text(row[c]) for c in RATIONALES if row.get(c)), ""),
        kin=kin(row),
    )


def kin(row: Mapping[str, Any]) -> str:
    """What exemplars of a task's row share with it: its task, or its instruction where rows have no task."""
    return str(row.get("task") or row.get("instruction") or "")


def _from_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    role = str(message.get("from", message.get("role")))
    if role not in SHAREGPT:
        raise BadRow(f"unknown role '{role}'")
    rest = {k: v for k, v in message.items() if k not in ("from", "value", "role")}
    return {"role": SHAREGPT[role], "content": message.get("value", message.get("content")), **rest}


def _chat(messages: Any, row: Mapping[str, Any]) -> Chat:
    """Checked messages: known roles, text contents, an answer in each assistant turn.

    The row's `system`, where it has one, goes before messages that begin with none.
    """
    clean = []
    for message in _turns(messages):
        # Arrow gives every message the keys of all; templates ask whether a key is there.
        one = {k: _without_nulls(v) if k == "tool_calls" else v for k, v in message.items() if v is not None}
        role = one.get("role")
        if role not in ROLES:
            raise BadRow(f"unknown role '{role}'")
        if isinstance(one.get("content"), list):
            one["content"] = _joined(one["content"])
        if not isinstance(one.setdefault("content", ""), str):
            raise BadRow("a content that is no text")
        if role == "assistant" and not (one["content"].strip() or one.get("tool_calls")):
            raise BadRow("empty answer")
        weight = one.get("weight", 1)
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise BadRow(f"a weight that is no number from 0 on: {weight}")
        clean.append(one)
    if not any(m["role"] == "assistant" for m in clean):
        raise BadRow("no assistant turn")
    if clean[0]["role"] == "assistant":
        raise BadRow("an assistant turn that nothing precedes")
    system = _text(row.get("system"))
    if system.strip() and clean[0]["role"] not in ("system", "developer"):
        clean.insert(0, {"role": "system", "content": system})
    return Chat(messages=clean, tools=_tools(row.get("tools")))


def _tools(value: Any) -> list[Any] | None:
    """Function schemas, as a list or as JSON text (Arrow would merge the keys of all)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("tools that are broken JSON") from None
    if value and not isinstance(value, list):
        raise BadRow("tools that are no list")
    return list(_without_nulls(value)) if isinstance(value, list) and value else None


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null: in Parquet each tool call has the arguments of all."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _joined(parts: Sequence[Any]) -> str:
    if any(not isinstance(p, Mapping) or p.get("type") != "text" for p in parts):
        raise BadRow("a content that is no text")
    return "".join(str(p.get("text") or "") for p in parts)
