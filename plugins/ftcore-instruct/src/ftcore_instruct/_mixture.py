"""The mixture: how many rows each source gives to an epoch, which ones, and in which form.

Every choice is a hash of (seed, source, example, variant) or (seed, source, pass): the mixture is the same on
any machine and for any number of ranks, and nothing has to be saved to resume it.

    rate    r = weight · min(rows, cap)                    (Raffel et al., 2020, with Flan's caps)
    epoch   Σ min(rows, cap) rows, shared out by r

A source walks through its rows: epoch after epoch takes the next ones, and each pass over all of them is
a new permutation. The k-th pass has the rows in their k-th form (template, exemplars, options, ...), of
which at most `variants` are made.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ftcore import UserError
from ftcore.seeding import derive
from ftcore.store import Rows
from ftcore_instruct import _formats
from ftcore_instruct._formats import BadRow, Chat, Task
from ftcore_instruct._sources import Source
from ftcore_instruct._templates import INVERTED, SEPARATORS, Choice, Templates

__all__ = ["FORM", "EpochOrder", "Items", "quotas"]

Ints = npt.NDArray[np.int64]
FORM = ("few_shot", "options", "cot", "inverted")
"""What a row was made with, 0 or 1 each: columns of the stored rows."""


def quotas(
    sizes: Sequence[int], weights: Sequence[float], caps: Sequence[int | None], total: int | None = None
) -> list[int]:
    """Rows that each source gives to an epoch: `total` shared by weight · min(size, cap).

    `total` is Σ min(size, cap) by default. Fractions go to the largest remainders; a source with any
    weight gives at least one row.

    Raises:
        UserError: no source has a weight.
    """
    counts = [min(n, c or n) for n, c in zip(sizes, caps, strict=True)]
    rates = [w * n for w, n in zip(weights, counts, strict=True)]
    if not sum(rates) > 0:
        raise UserError("every source of the mixture has weight 0, or no row")
    exact = [(total or sum(counts)) * r / sum(rates) for r in rates]
    whole = [max(math.floor(x), int(r > 0)) for x, r in zip(exact, rates, strict=True)]
    missing = (total or sum(counts)) - sum(whole)
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: max(0, missing)]:
        whole[i] += 1
    return whole


class Items:
    """The items of one split, made as they are read: what `_rows.Encoder` turns into token rows.

    Args:
        sources: with the rows that are used.
        needed: rows of each source that training will draw in all (None: each row once, as for evaluation).
        variants: forms in which a row is made at most.
        seed: of every choice.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        templates: Templates,
        *,
        seed: int,
        needed: Sequence[int] | None = None,
        variants: int = 1,
        drawn: bool = True,
    ) -> None:
        self.sources = list(sources)
        self.templates = templates
        self.seed = seed
        self.needed = needed
        self.variants = variants
        self.drawn = drawn
        self.remarks: list[str] = []
        self.column_names: list[str] = []
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for i, one in enumerate(self.sources):
            read = (one.form, one.columns, one.is_asked)
            parts = (one.name, one.rows.fingerprint, one.settings, *read, self.passes(i))
            digest.update(repr(parts).encode())
            digest.update(np.asarray(one.kept, "<i8").tobytes())
        parts2 = (self.templates.source, self.seed, self.variants, self.drawn)
        digest.update(repr(parts2).encode())
        return digest.hexdigest()[:24]

    def _varies(self, one: Source) -> bool:
        """Whether a row may differ from one pass to the next."""
        return self.drawn and one.form in ("task", "alpaca")

    def passes(self, index: int) -> list[int]:
        """Rows of source `index` that are made in each form: all of them, fewer in the last."""
        one, size = self.sources[index], len(self.sources[index].kept)
        if self.needed is None:
            return [size]
        limit = self.variants if self._varies(one) else 1
        full, rest = divmod(self.needed[index], max(1, size))
        return ([size] * full + ([rest] if rest else []))[:limit]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, one in enumerate(self.sources):
            tasks = _Exemplars(one)
            for variant, count in enumerate(self.passes(i)):
                picked = one.kept
                if count < len(picked):
                    rng = np.random.default_rng(derive(self.seed, "subset", one.name, variant))
                    picked = np.sort(rng.choice(picked, count, replace=False))
                for example in picked.tolist():
                    yield self._item(i, example, variant, tasks)
            one.close()

    def _item(self, source: int, example: int, variant: int, tasks: _Exemplars) -> dict[str, Any]:
        one = self.sources[source]
        item: dict[str, Any] = {
            "source": source,
            "example": example,
            "variant": variant,
            "where": f"{one.name} row {example}",
            "asked": one.is_asked,
        }
        try:
            found = one.read(example)
            if isinstance(found, Chat):
                return {**item, "chat": found, "task": one.task(example), "choices": [], "choice": -1}
            rng = random.Random(derive(self.seed, one.name, example, variant))
            return {**item, **self._render(one, found, example, rng, tasks)}
        except BadRow as reason:
            return {**item, "bad": str(reason)}

    def _render(
        self, one: Source, task: Task, example: int, rng: random.Random, tasks: _Exemplars
    ) -> dict[str, Any]:
        """Prompt, answer and exemplars of a task's row. The draws come in a fixed order."""
        s = one.settings
        choice = Choice(cot=s.cot >= 1 and (bool(task.rationale) or one.is_asked))
        shots, separator = s.shots, SEPARATORS[0]
        if self.drawn:
            number, listed, reasons, turned, few = (rng.random() for _ in range(5))
            choice = Choice(
                template=int(number * len(self.templates.of(task.task))),
                options=listed < s.options,
                cot=bool(task.rationale) and reasons < s.cot,
                inverted=_inverted(task, turned / s.invert) if turned < s.invert else "",
            )
            shots = 1 + int(rng.random() * s.shots) if few < s.few_shot and s.shots else 0
            separator = SEPARATORS[int(rng.random() * len(SEPARATORS))]
        others = [] if self.drawn else [*task.targets, *task.choices]  # as they are said, to be compared
        prompt, answer, *said = self.templates.render(task, choice, rng, others)
        exemplars = []
        if shots and not task.verbatim:
            for other in tasks.draw(task, example, shots, rng, choice):
                with suppress(BadRow):  # a template that fails on it: said where its own turn comes
                    exemplars.append("".join(self.templates.render(other, choice, rng)))
        form = (
            bool(exemplars),
            choice.options and bool(task.choices) and not choice.inverted,
            choice.cot,
            bool(choice.inverted),
        )
        return {
            "prompt": prompt,
            "answer": answer,
            "shots": exemplars,
            "separator": separator,
            "form": dict(zip(FORM, map(int, form), strict=True)),
            "task": task.task,
            "targets": said[: len(task.targets)],
            # Of an answer that follows reasons, the likelihood without them says nothing.
            "choices": [] if choice.cot else said[len(task.targets) :],
            "choice": task.choices.index(task.target) if task.target in task.choices else -1,
        }


def _inverted(task: Task, draw: float) -> str:
    """Which way a row is turned around; none where it has no input, or its answer is one of few choices."""
    if not task.input.strip() or task.choices or task.verbatim:
        return ""
    forms = list(INVERTED) if task.rationale else ["question"]
    return forms[int(draw * len(forms))]


def _question(task: Task) -> tuple[str, ...]:
    """What tells a row's question from another's: its input (else its instruction), and the choices."""
    return (task.input.strip() or task.instruction.strip(), *sorted(task.choices))


def _fits(task: Task, choice: Choice) -> bool:
    """Whether a row has all that its form is made of."""
    with_reasons = choice.cot or "rationale" in choice.inverted
    return bool(task.rationale or not with_reasons) and bool(task.input.strip() or not choice.inverted)


class _Exemplars:
    """Rows of a source by task (by instruction where they have none), to draw few-shot exemplars from."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._by_task: dict[str, Ints] | None = None

    def _index(self) -> dict[str, Ints]:
        """The used rows of each task."""
        if self._by_task is None:
            found: dict[str, list[int]] = {}
            for i in self._source.kept.tolist():
                found.setdefault(_formats.kin(self._source.rows[i]), []).append(i)
            self._by_task = {kin: np.asarray(rows) for kin, rows in found.items()}
        return self._by_task

    def draw(self, task: Task, example: int, count: int, rng: random.Random, choice: Choice) -> list[Task]:
        """Up to `count` rows of the same task: not the row itself, its double, or one with its question.

        Fewer where the task has no more such rows, or none that have what `choice` needs (a rationale).
        """
        rows = self._index()[task.kin]
        picked: list[Task] = []
        seen, questions = {example}, {_question(task)}
        for _ in range(4 * count):
            if len(picked) == count or not len(rows):
                break
            row = int(rows[int(rng.random() * len(rows))])
            if row in seen:
                continue
            seen.add(row)
            try:
                other = self._source.read(row)
            except BadRow:
                continue
            if not isinstance(other, Task) or not _fits(other, choice):
                continue
            if _question(other) not in questions:
                questions.add(_question(other))
                picked.append(other)
        return picked


class EpochOrder:
    """The rows of each epoch of the mixture, in random order.

    Args:
        rows: the stored rows, with the columns `source` and `variant`.
        quotas: examples of each source in an epoch.
        made: examples of each source that were made in the first form. Where they became more rows
            (each answer of a chat) or fewer (unusable ones), so does the quota.
        dry: what a source does that has fewer rows than its quota: `repeat` or `drop`.
    """

    def __init__(
        self,
        rows: Rows,
        quotas: Sequence[int],
        made: Sequence[int],
        names: Sequence[str],
        dry: Sequence[str],
        seed: int,
    ) -> None:
        source, variant = rows.numbers("source"), rows.numbers("variant")
        order = np.lexsort((variant, source))  # which is stable
        starts = np.flatnonzero(np.diff(source[order] * (variant.max() + 1) + variant[order], prepend=-1))
        self.names = list(names)
        self.seed = seed
        # Of each source: its rows, form by form.
        self._forms: list[list[npt.NDArray[np.int32]]] = [[] for _ in quotas]
        for part in np.split(order.astype(np.int32), starts[1:]):
            self._forms[int(source[part[0]])].append(part)
        self.quotas = []
        for name, share, count, forms, policy in zip(names, quotas, made, self._forms, dry, strict=True):
            have = len(forms[0]) if forms else 0
            if share and not have:
                raise UserError(f"source '{name}' of the mixture has no usable row; take it out, or mend it")
            quota = max(1, round(share * have / count)) if share else 0
            if policy == "error" and quota > have:
                raise UserError(f"source '{name}' runs dry: an epoch takes {quota} rows, it has {have}")
            self.quotas.append(min(quota, have) if policy == "drop" else quota)
        self.rows_per_epoch = sum(self.quotas)

    def __call__(self, epoch: int) -> Ints:
        """Rows of an epoch, int64, always equally many; a row occurs twice where its source was repeated."""
        parts = [self._stream(i, epoch * q, q) for i, q in enumerate(self.quotas) if q]
        rng = np.random.default_rng(derive(self.seed, "mixture", epoch))
        return np.concatenate(parts)[rng.permutation(self.rows_per_epoch)].astype(np.int64)

    def _stream(self, source: int, start: int, count: int) -> npt.NDArray[np.int32]:
        """Places [start, +count) of a source's endless walk through its rows."""
        forms, parts, number = self._forms[source], [], 0
        while count:
            rows = forms[number % len(forms)]
            if start < len(rows):
                rng = np.random.default_rng(derive(self.seed, "pass", self.names[source], number))
                part = rows[rng.permutation(len(rows))[start : start + count]]
                parts.append(part)
                count -= len(part)
            start, number = max(0, start - len(rows)), number + 1
        return np.concatenate(parts)
