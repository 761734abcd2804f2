"""Task instances to prompt and answer, by Jinja templates, with every choice drawn from one generator.

A template has `prompt`, and may have `answer` (default `ANSWER`). It sees `instruction`, `input`, `target`,
`rationale`, `task`, `choices`, `options` (the listed choices, or nothing) and `cot` (whether to
reason before the answer).
"""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import yaml

from ftcore import UserError
from ftcore_instruct._formats import BadRow, Task

__all__ = ["ANSWER_MARK", "SEPARATORS", "Choice", "Templates"]

ANSWER_MARK = "the answer is "
"""What stands before the answer that follows a chain of thought; evaluation looks for it."""

ANSWER = "{% if cot %}{{ rationale }}\nSo " + ANSWER_MARK + "{{ target }}.{% else %}{{ target }}{% endif %}"
SEPARATORS = ("\n\n", "\n\n\n", "\n---\n", "\n###\n\n", "\n\n***\n")
"""Between the exemplars of a few-shot prompt; one is drawn for each row."""

BUILT_IN = {
    "*": [
        "{% if instruction and input %}{{ instruction }}\n\n{% endif %}{{ input or instruction }}\n"
        "{% if options %}{{ options }}\n{% endif %}{% if cot %}Think step by step.\n{% endif %}",
        "{% if instruction %}Task: {{ instruction }}\n{% endif %}"
        "{% if input %}Input: {{ input }}\n{% endif %}"
        "{% if options %}{{ options }}\n{% endif %}{% if cot %}Explain, then answer.\n{% endif %}Output:\n",
        "{% if input %}{{ input }}\n\n{% endif %}{% if instruction %}{{ instruction }}\n{% endif %}"
        "{% if options %}{{ options }}\n{% endif %}"
        "{% if cot %}Let us reason step by step.\n{% endif %}Answer:\n",
        "{% if instruction and input %}Read this first: {{ instruction }}\n\n{% endif %}"
        "Q: {{ input or instruction }}\n"
        "{% if options %}{{ options }}\n{% endif %}A{% if cot %} (give your reasons){% endif %}:\n",
    ]
}
INVERTED = {
    "question": (
        "{% if instruction %}{{ instruction }}\n\n{% endif %}The answer is: {{ target }}\n"
        "Write an input with this answer.\n",
        "{{ input }}",
    ),
    "rationale": (
        "{{ input }}\nThe answer is: {{ target }}\nExplain step by step why.\n",
        "{{ rationale }}",
    ),
    "question_of_rationale": (
        "Reasoning: {{ rationale }}\nThe answer is: {{ target }}\nWrite the question.\n",
        "{{ input }}",
    ),
}
"""Turned-around tasks: (prompt, answer). Those with a rationale are for rows that have one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was drawn for one row; its exemplars get the same."""

    template: int = 0  # of those that fit the task, modulo their number
    options: bool = True
    cot: bool = False
    inverted: str = ""  # a key of INVERTED


class Templates:
    """The task templates: built-in ones, or those of a YAML file `{task pattern: [template, ...]}`.

    Raises:
        UserError: a file that is missing, or no such mapping, or a template that does not parse.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path or "built-in templates"
        self.source: Mapping[str, Sequence[Any]] = BUILT_IN if path is None else _read(Path(path))
        # Sandboxed: a template can't reach Python. Strict: a misspelt field is an error, not an empty text.
        self._env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        self._compiled = {p: [self._compile(p, t) for t in ts] for p, ts in self.source.items()}
        self._inverted = {k: tuple(map(self._parse, v)) for k, v in INVERTED.items()}
        self._of_task: dict[str, list[Any]] = {}

    def _compile(self, pattern: str, template: Any) -> tuple[Any, Any]:
        try:
            if not isinstance(template, str | Mapping):
                raise TypeError("it must be a text, or {prompt: ..., answer: ...}")
            parts = {"prompt": template} if isinstance(template, str) else dict(template)
            if extra := parts.keys() - {"prompt", "answer"}:
                raise ValueError(f"no key {min(map(str, extra))}; there are prompt and answer")
            return self._parse(parts["prompt"]), self._parse(parts.get("answer", ANSWER))
        except KeyError as error:
            raise UserError(f"{self.path}: a template of '{pattern}' has no {error.args[0]}") from error
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}: a template of '{pattern}' is wrong: {error}") from error

    def _parse(self, text: Any) -> Any:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        template = self._env.from_string(text)
        template.globals = dict(template.globals)  # a ChainMap is copied key by key in each rendering
        return template

    def of(self, task: str) -> list[tuple[Any, Any]]:
        """The templates of a task: those of the first pattern that fits its name."""
        if task not in self._of_task:
            pattern = next((p for p in self._compiled if fnmatch.fnmatchcase(task, p)), None)
            if pattern is None:
                raise UserError(f"{self.path}: no pattern fits the task '{task}'; end with '*'")
            self._of_task[task] = self._compiled[pattern]
        return self._of_task[task]

    def render(
        self, one: Task, choice: Choice, order: random.Random | None = None, others: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Prompt and answer of one instance, and what the answer would be for each of `others`.

        Args:
            order: shuffles the listed options.
            others: targets; their answers are without reasons.

        Raises:
            BadRow: the template fails on this row, or gives no prompt or no answer; names the template.
        """
        if one.verbatim:
            return one.input, one.target, *others
        number = choice.template % len(self.of(one.task))
        prompt, answer = self._inverted[choice.inverted] if choice.inverted else self.of(one.task)[number]
        listed = list(one.choices) if choice.options and not choice.inverted else []
        if order is not None:
            order.shuffle(listed)
        fields = {
            "instruction": one.instruction,
            "input": one.input,
            "target": one.target,
            "rationale": one.rationale,
            "task": one.task,
            "choices": listed,
            "options": "\n".join(["Options:", *(f"- {c}" for c in listed)]) if listed else "",
            "cot": choice.cot,
        }
        name = f"'{choice.inverted}', turned around," if choice.inverted else f"{number} of {self.path}"
        try:
            made = prompt.render(fields), answer.render(fields)
            said = tuple(answer.render({**fields, "target": t, "cot": False}) for t in others)
        except Exception as error:  # whatever the template's own code raises
            raise BadRow(f"template {name} fails: {error}") from error
        for part, text in zip(("prompt", "answer"), made, strict=True):
            if not text.strip():
                raise BadRow(f"template {name} gives an empty {part}")
        return *made, *said


def _read(path: Path) -> Mapping[str, Sequence[Any]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"plugin.instruct.templates: can't read {path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, list) and v for v in found.values()):
        raise UserError(f"plugin.instruct.templates: {path} must map task patterns to lists of templates")
    patterns = list(map(str, found))
    if "*" in patterns[:-1]:
        unused = patterns[patterns.index("*") + 1]
        raise UserError(
            f"plugin.instruct.templates: {path}: '{unused}' stands after '*', which fits every task, and is"
            " never used; put '*' last"
        )
    return {str(pattern): templates for pattern, templates in found.items()}
