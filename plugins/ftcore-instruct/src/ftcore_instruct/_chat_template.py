"""Which characters of a rendered chat are an assistant's: exactly what the model is to say, and its end.

A template with `{% generation %}` marks them itself. For any other, the chat is rendered up to each
answer, as at inference: that must be a prefix of the whole, or the model would be trained on prompts that
it never meets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ftcore_instruct._formats import BadRow, Chat

__all__ = ["PLAIN", "Renderer"]

PLAIN = """\
{%- set refusal = 'the built-in template has no tools; set plugin.instruct.chat_template' -%}
{%- if tools %}{{ raise_exception(refusal) }}{% endif -%}
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{%- if message.tool_calls %}{{ raise_exception(refusal) }}{% endif -%}
{{ message['role'] | capitalize + ': ' + message['content'] | trim -}}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{{ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
"""For tokenizers without a template: `User: ...`, `Assistant: ...` and the end token, a line each."""

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAIL = 256  # characters at the end of a turn in which its end is looked for

Span = tuple[int, int, int]
"""(message, start, end) of an answer, in characters of the rendered chat."""


class Renderer:
    """Renders chats by a tokenizer's template, and finds the answers in them.

    Args:
        tokenizer: one that has a `chat_template`.
        last_only: find the last assistant turn alone.
    """

    def __init__(self, tokenizer: Any, last_only: bool = False) -> None:
        self.tokenizer = tokenizer
        self.last_only = last_only
        self._templates: dict[bool, str] = {}
        self._names: dict[str, Any] = tokenizer.special_tokens_map
        self.specials = set(tokenizer.all_special_tokens)
        self.specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        added = {t.content for t in tokenizer.added_tokens_decoder.values()} | self.specials
        names = sorted((t for t in added if t.strip()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.closing = re.compile(rf"(?:\s|{self.control.pattern})*\Z")
        self.openings = {t[:2] for t in self.specials}  # a search for these is cheap, and rarely finds one

    def prompt(self, chat: Chat, turn: int) -> str:
        """The chat up to message `turn`, as it is at inference when the model is to answer."""
        return self._render(chat, turn, prompt=True)

    def answers(self, chat: Chat) -> tuple[str, list[Span]]:
        """The rendered chat, and each answer in it, with the token that ends its turn.

        Raises:
            BadRow: the template can't render the chat, renders it otherwise than at inference, or marks no
                end of a turn; or a text holds a control token, which would be read as one.
        """
        for message in chat.messages:
            self._check_text(message["content"])
        turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if MARKED.search(self._template(chat)):
            whole, spans = self._marked(chat, turns)
            return whole, spans[-1:] if self.last_only else spans
        whole = self._render(chat, len(chat.messages))
        if self.last_only:
            turns = turns[-1:]
        return whole, [(turn, *self._span(chat, whole, turn)) for turn in turns]

    def _check_text(self, text: str) -> None:
        if not any(opening in text for opening in self.openings):
            return
        for found in self.control.finditer(text):
            if found[0] in self.specials:
                raise BadRow(f"a text holds the control token {found[0]}")

    def _template(self, chat: Chat) -> str:
        """The template for chats with tools, or without; asked for once."""
        has_tools = chat.tools is not None
        if has_tools not in self._templates:
            self._templates[has_tools] = self.tokenizer.get_chat_template(tools=chat.tools)
        return self._templates[has_tools]

    def _render(self, chat: Chat, stop: int, prompt: bool = False) -> str:
        return self._run(chat, stop, add_generation_prompt=prompt)[0]

    def _run(self, chat: Chat, stop: int, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of the messages up to `stop`, and what `{% generation %}` marks in it where asked for.

        What `apply_chat_template` does, without its checks, which would take longer than the rendering.
        """
        try:
            texts, marks = render_jinja_template(
                conversations=[chat.messages[:stop]],
                tools=chat.tools,
                chat_template=self._template(chat),
                **options,
                **self._names,
            )
        except Exception as error:  # whatever the template's own code raises
            raise BadRow(f"the chat template fails: {str(error).partition(chr(10))[0]}") from error
        return texts[0], marks[0] if marks else []

    def _span(self, chat: Chat, whole: str, turn: int) -> tuple[int, int]:
        before = self._render(chat, turn, prompt=True)
        alone = whole if turn == len(chat.messages) - 1 else self._render(chat, turn + 1)
        if not (whole.startswith(before) and alone.startswith(before)):
            raise BadRow(
                "the chat template renders a prompt otherwise once it is answered (try train_on=last)"
            )
        shared = len(alone) if whole.startswith(alone) else _shared(alone, whole)
        end = self._end(alone, len(before), shared)
        if end is None and shared < len(alone):
            raise BadRow(
                "the chat template renders an answer otherwise once it is followed (try train_on=last)"
            )
        if end is None:
            raise BadRow("the chat template marks no end of an answer, so the model would learn none")
        return len(before), end

    def _end(self, turn: str, start: int, limit: int) -> int | None:
        """Where the token ends that closes a turn: the first special one of those after its last text.

        Without a special token there, the last added one (`</tool_call>` may be the text's own).
        """
        start = max(start, len(turn) - TAIL)
        tail = turn[start:limit]
        run = self.closing.search(turn[start:])
        tokens = list(self.control.finditer(tail, run.start() if run else len(tail)))
        for token in tokens:
            if token[0] in self.specials:
                return start + token.end()
        return start + tokens[-1].end() if tokens else None

    def _marked(self, chat: Chat, turns: Sequence[int]) -> tuple[str, list[Span]]:
        """The answers as the template marks them, each with the control token that follows it directly."""
        text, marks = self._run(chat, len(chat.messages), return_assistant_tokens_mask=True)
        if len(marks) != len(turns):
            raise BadRow(f"the chat template marks {len(marks)} answers of {len(turns)}")
        spans = []
        for turn, (start, end) in zip(turns, marks, strict=True):
            closed = self._end(text[:end], start, end) is not None
            follows = None if closed else self.control.match(text, end)
            spans.append((turn, start, follows.end() if follows else end))
        return text, spans


def _shared(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
