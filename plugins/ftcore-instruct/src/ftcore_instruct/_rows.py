"""Items of a split to token rows: tokens, labels that are exact, and what is cut where a row is too long."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ftcore import Dropped, UserError
from ftcore_instruct._chat_template import Renderer, Span
from ftcore_instruct._formats import BadRow, Chat
from ftcore_instruct._mixture import FORM

__all__ = ["Encoder"]

IGNORED = -100
LOST = "answer lost to truncation"
Row = dict[str, Any]
Ints = npt.NDArray[np.int32]


@dataclass
class _Waiting:
    """A chat that is being fitted into `max_length`."""

    number: int
    item: Mapping[str, Any]
    chat: Chat
    shots: list[str]
    full: int = 0  # tokens before anything was cut


class Encoder:
    """Turns items (see `_mixture`) into rows.

    Args:
        tokenizer: a fast tokenizer with a `chat_template`.
        seq2seq: for an encoder-decoder: a row for each answer, `labels` are its tokens.
        max_length: tokens of a row (of source and of target each, for an encoder-decoder).
        train_on: `assistant` (every answer of a chat), `last`, or `weights` (by each message's `weight`).
        wrap: whether prompt and answer of a task become a chat.
        system: a system message for chats that have none.
    """

    def __init__(
        self, tokenizer: Any, *, seq2seq: bool, max_length: int, train_on: str, wrap: bool, system: str | None
    ) -> None:
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise UserError("plugin.instruct needs a fast tokenizer (one with a tokenizer.json)")
        self.seq2seq = seq2seq
        self.max_length = max_length
        self.train_on = train_on
        self.wrap = wrap
        self.system = system
        self.renderer = Renderer(tokenizer, last_only=train_on == "last")

    def rows(self, items: Sequence[Mapping[str, Any]], evaluated: bool) -> list[Any]:
        """For each item a row, several, or a `Dropped` that says why.

        A prompt that is too long loses exemplars, then its beginning; a chat loses what follows the last
        answer that is whole; an answer is never cut.
        """
        entries: list[Any] = [None] * len(items)
        chats, texts = [], []
        for i, item in enumerate(items):
            if "bad" in item:
                entries[i] = Dropped(item["bad"], item["where"])
            elif "chat" in item:
                chats.append(i)
            else:
                texts.append(i)
        with _plain_state(self.backend):
            for i, entry in self._chats([(i, items[i], items[i]["chat"]) for i in chats]):
                entries[i] = entry
            for i, entry in (self._wrapped if self.wrap else self._texts)([(i, items[i]) for i in texts]):
                entries[i] = entry
            if evaluated:
                entries = [self._for_evaluation(x, e) for x, e in zip(items, entries, strict=True)]
        return [
            e if isinstance(e, Dropped) else [self._whole(r, x) for r in e]
            for x, e in zip(items, entries, strict=True)
        ]

    def _whole(self, row: Row, item: Mapping[str, Any]) -> Row:
        """The row with all of its columns: weights of 1 where a task has none beside chats that have."""
        row = {name: value for name, value in row.items() if name != "said"}
        if self.train_on == "weights" and "weights" not in row:
            row["weights"] = np.ones(len(row["labels"]), np.float32)
        return row if item.get("asked") else _noted(row, item)

    # Chats.

    def _chats(self, chats: Sequence[tuple[int, Mapping[str, Any], Chat]]) -> Iterator[tuple[int, Any]]:
        """(item, rows or Dropped) of each chat.

        One that is too long loses its end. Where that would be its first answer, it ends after that one, and
        what stands before loses exemplars, then its beginning, until the answer fits.
        """
        waiting = [
            _Waiting(i, item, self._with_system(chat), list(item.get("shots", ()))) for i, item, chat in chats
        ]
        while waiting:
            rendered, again = [], []
            for one in waiting:
                try:
                    text, spans = self.renderer.answers(one.chat)
                    rendered.append((one, text, self._trained(one.chat, spans)))
                except BadRow as reason:
                    yield one.number, Dropped(str(reason), one.item["where"])
            if self.seq2seq:
                for one, _, spans in rendered:
                    yield one.number, self._turn_rows(one.item, one.chat, spans)
                return
            encodings = self.backend.encode_batch([text for _, text, _ in rendered], add_special_tokens=False)
            for (one, text, spans), encoding in zip(rendered, encodings, strict=True):
                try:
                    row, over = self._chat_row(one.chat, spans, encoding)
                except BadRow as reason:
                    yield one.number, Dropped(str(reason), one.item["where"])
                    continue
                length = len(encoding.ids)
                if over <= 0:
                    row["truncated"] = max(row["truncated"], one.full - length)
                    yield one.number, [row]
                elif self._shorten(one, spans[0][0], math.ceil(over * len(text) / length)):
                    one.full = one.full or length
                    again.append(one)
                else:
                    yield one.number, Dropped(LOST, one.item["where"])
            waiting = again

    def _shorten(self, one: _Waiting, turn: int, characters: int) -> bool:
        """Take an exemplar, else so many characters, before answer `turn`; False: none is left."""
        if one.shots:
            one.shots = one.shots[1:]
            one.chat = self._with_system(_two_turns(one.item, one.shots))
            one.full = 0  # fewer exemplars are not a cut
            return True
        messages = [dict(m) for m in one.chat.messages[: turn + 1]]
        longest = max(messages[:-1], key=lambda m: len(m["content"]))
        if len(longest["content"]) <= characters:
            return False
        longest["content"] = longest["content"][characters:]
        one.chat = Chat(messages=messages, tools=one.chat.tools)
        return True

    def _with_system(self, chat: Chat) -> Chat:
        if self.system is None or chat.messages[0]["role"] in ("system", "developer"):
            return chat
        return Chat(messages=[{"role": "system", "content": self.system}, *chat.messages], tools=chat.tools)

    def _trained(self, chat: Chat, spans: list[Span]) -> list[Span]:
        """The answers that are trained; those of weight 0 are not."""
        if self.train_on == "weights":
            spans = [s for s in spans if chat.messages[s[0]].get("weight", 1)]
            if not spans:
                raise BadRow("every answer has weight 0")
        elif any(float(m.get("weight", 1)) != 1 for m in chat.messages):
            raise UserError("messages have weights; say plugin.instruct.train_on=weights, or take them out")
        return spans

    def _chat_row(self, chat: Chat, spans: Sequence[Span], encoding: Any) -> tuple[Row, int]:
        """A decoder's row, and by how many tokens its first answer reaches over `max_length`.

        One that is too long ends with the last answer that is whole. `said` is the text of that.
        """
        whole = np.array(encoding.ids, np.int32)
        places = [(turn, *_tokens(encoding, start, end)) for turn, start, end in spans]
        over, stop = places[0][2] - self.max_length, len(whole)
        if stop > self.max_length:
            places = [place for place in places if place[2] <= self.max_length] or places[:1]
            stop = places[-1][2]
        ids = whole[:stop]
        labels = np.full(len(ids), IGNORED, np.int32)
        weights = np.zeros(len(ids), np.float32)
        for turn, first, last in places:
            labels[first:last] = ids[first:last]
            weights[first:last] = chat.messages[turn].get("weight", 1)
        labels[:1] = IGNORED  # nothing precedes it
        row = {"input_ids": ids, "labels": labels, "truncated": len(whole) - len(ids)}
        turn, first, last = places[-1]
        row["said"] = chat.messages[turn]["content"]
        if chat.messages[turn].get("tool_calls"):  # as it is decoded from what the model generates
            row["said"] = self.tokenizer.decode(whole[first:last], skip_special_tokens=True)
        return ({**row, "weights": weights} if self.train_on == "weights" else row), over

    def _turn_rows(self, item: Mapping[str, Any], chat: Chat, spans: Sequence[Span]) -> Any:
        """For an encoder-decoder: each answer, after what precedes it."""
        messages = [chat.messages[turn] for turn, _, _ in spans]
        if not all(m["content"].strip() for m in messages):
            return Dropped("a tool call as an answer, which an encoder-decoder can't learn", item["where"])
        try:
            prompts = [self.renderer.prompt(chat, turn) for turn, _, _ in spans]
        except BadRow as reason:
            return Dropped(str(reason), item["where"])
        rows = [r for r in self._pairs(prompts, [m["content"].strip() for m in messages]) if r is not None]
        if len(rows) < len(messages):
            return Dropped(LOST, item["where"])
        for row, message in zip(rows, messages, strict=True):
            row["said"] = message["content"]
            if self.train_on == "weights":
                row["weights"] = np.full(len(row["labels"]), message.get("weight", 1), np.float32)
        return rows

    # Tasks: a prompt and its answer.

    def _wrapped(self, texts: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Any]]:
        """Prompts and answers as chats of two turns."""
        yield from self._chats([(i, item, _two_turns(item, item["shots"])) for i, item in texts])

    def _texts(self, texts: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Any]]:
        """Prompts and answers as plain text: their tokens one after the other, and the end token."""
        prompts = [_joined(item["shots"], item["separator"], item["prompt"]) for _, item in texts]
        if self.seq2seq:
            pairs = self._pairs(prompts, [item["answer"] for _, item in texts], [item for _, item in texts])
            for (i, item), row in zip(texts, pairs, strict=True):
                yield i, [row] if row is not None else Dropped(LOST, item["where"])
            return
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError("the tokenizer has no end token, so no end of an answer would be learned")
        self.backend.encode_special_tokens = True  # a text that spells a control token is text
        before = self.backend.encode_batch_fast(prompts, add_special_tokens=True)
        after = self.backend.encode_batch_fast(
            [item["answer"] for _, item in texts], add_special_tokens=False
        )
        for (i, item), prompt, answer in zip(texts, before, after, strict=True):
            row = self._text_row(_open_ended(prompt.ids, eos), [*answer.ids, eos], item, eos)
            yield i, [row] if row is not None else Dropped(LOST, item["where"])

    def _text_row(
        self, prompt: list[int], answer: list[int], item: Mapping[str, Any], eos: int
    ) -> Row | None:
        room, shots = self.max_length - len(answer), list(item["shots"])
        if room < 1:
            return None
        while len(prompt) > room and shots:
            shots = _fewer(shots, len(prompt) - room, item, len(prompt))
            text = _joined(shots, item["separator"], item["prompt"])
            prompt = _open_ended(self.backend.encode(text, add_special_tokens=True).ids, eos)
        cut = max(0, len(prompt) - room)
        if cut:
            head = int(prompt[0] == self.tokenizer.bos_token_id)  # the start token stays first
            prompt = prompt[:head] + prompt[cut + head :]
        ids = np.array(prompt + answer, np.int32)
        labels = ids.copy()
        labels[: max(1, len(prompt))] = IGNORED
        return {"input_ids": ids, "labels": labels, "truncated": cut}

    def _pairs(
        self, prompts: Sequence[str], answers: Sequence[str], items: Sequence[Mapping[str, Any]] = ()
    ) -> list[Row | None]:
        """Rows of an encoder-decoder: each prompt's tokens, the answer's as labels; None where too many.

        `items` are those of tasks, whose texts are text even where they spell a control token.
        """
        if not prompts:
            return []
        options = {"verbose": False, "split_special_tokens": bool(items)}
        inputs = self.tokenizer(list(prompts), **options)["input_ids"]
        targets = self.tokenizer(text_target=list(answers), verbose=False, split_special_tokens=True)[
            "input_ids"
        ]
        rows: list[Row | None] = []
        for n, (ids, labels) in enumerate(zip(inputs, targets, strict=True)):
            shots = list(items[n]["shots"]) if items else []
            while len(ids) > self.max_length and shots:
                shots = _fewer(shots, len(ids) - self.max_length, items[n], len(ids))
                text = _joined(shots, items[n]["separator"], items[n]["prompt"])
                ids = self.tokenizer(text, **options)["input_ids"]
            cut = max(0, len(ids) - self.max_length)
            row = {
                "input_ids": np.array(ids[cut:], np.int32),
                "labels": np.array(labels, np.int32),
                "truncated": cut,
            }
            rows.append(row if len(labels) <= self.max_length else None)
        return rows

    # What evaluation reads.

    def _for_evaluation(self, item: Mapping[str, Any], entry: Any) -> Any:
        """The last answer's row, with the texts and choices it is measured by; `asked` ones are not."""
        if isinstance(entry, Dropped):
            return entry
        try:
            choices = [self._choice(item, c) for c in item["choices"]]
        except BadRow as reason:
            return Dropped(f"a choice can't be scored: {reason}", item["where"])
        extra: Row = {
            "choice_ids": np.array([t for c in choices for t in c], np.int32),
            "choice_lengths": np.array([len(c) for c in choices], np.int32),
        }
        if not item.get("asked"):
            targets = [t.strip() for t in item.get("targets") or [entry[-1]["said"]]]
            extra |= {
                "task": item["task"],
                "target": targets[0],
                "targets": json.dumps(targets, ensure_ascii=False),
                "choice": item["choice"],
            }
        return [{**entry[-1], **extra}]

    def _choice(self, item: Mapping[str, Any], text: str) -> list[int]:
        """A choice's tokens, as they would be trained if it were the answer."""
        if self.seq2seq:
            text = text.strip() if self.wrap else text
            return list(
                self.tokenizer(text_target=text, verbose=False, split_special_tokens=True)["input_ids"]
            )
        if not self.wrap:
            self.backend.encode_special_tokens = True
            return [*self.backend.encode(text, add_special_tokens=False).ids, self.tokenizer.eos_token_id]
        chat = self._with_system(_two_turns({**item, "answer": text}, item["shots"]))
        whole, spans = self.renderer.answers(chat)
        encoding = self.backend.encode(whole, add_special_tokens=False)
        first, last = _tokens(encoding, *spans[-1][1:])
        return list(encoding.ids[first:last])


def _noted(row: Row, item: Mapping[str, Any]) -> Row:
    """The row, with where in the mixture it stands, how much of it was cut, and its form."""
    return {
        **row,
        "source": item["source"],
        "example": item["example"],
        "variant": item["variant"],
        "cut": row["truncated"],
        **(item.get("form") or dict.fromkeys(FORM, 0)),
    }


@contextmanager
def _plain_state(backend: Any) -> Iterator[None]:
    """A tokenizer that neither cuts nor pads, as it was afterwards: other calls leave settings behind."""
    cut, pad, spelt = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    try:
        yield
    finally:
        backend.encode_special_tokens = spelt
        if cut:
            backend.enable_truncation(**cut)
        if pad:
            backend.enable_padding(**pad)


def _tokens(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) of the characters [start, end).

    Raises:
        BadRow: a token reaches over the start, so that the prompt has other tokens at inference.
    """
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    last = next(
        (t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None
    )
    if first is None or last is None:
        raise BadRow("an answer without tokens")
    if encoding.token_to_chars(first)[0] < start:
        raise BadRow(
            "a token reaches from the prompt into the answer (the chat template needs a break there)"
        )
    while (more := encoding.token_to_chars(last + 1)) is not None and more[0] < end:
        last += 1  # the further bytes of the last character
    return first, last + 1


def _open_ended(ids: list[int], eos: int) -> list[int]:
    """A prompt without the end token that some tokenizers add to every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _joined(shots: Sequence[str], separator: str, prompt: str) -> str:
    return separator.join([*shots, prompt])


def _fewer(shots: list[str], excess: int, item: Mapping[str, Any], tokens: int) -> list[str]:
    """Fewer exemplars: as many less as make up for the excess, by the prompt's mean tokens a character."""
    characters = len(_joined(shots, item["separator"], item["prompt"]))
    dropped = 0
    while shots and dropped * tokens < excess * characters:
        dropped += len(shots[0]) + len(item["separator"])
        shots = shots[1:]
    return shots


def _two_turns(item: Mapping[str, Any], shots: Sequence[str]) -> Chat:
    text = _joined(shots, item["separator"], item["prompt"]).strip()
    return Chat(
        messages=[{"role": "user", "content": text}, {"role": "assistant", "content": item["answer"].strip()}]
    )
