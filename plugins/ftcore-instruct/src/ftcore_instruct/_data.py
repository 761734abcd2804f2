"""The splits of a run: sources opened, held-out tasks and overlapping rows taken out, limits, quotas."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftcore import UserError, data
from ftcore.config import Config, FilesData, Limit
from ftcore.errors import nearest, note
from ftcore.prepare import cache_root
from ftcore.seeding import derive
from ftcore_instruct import _formats, _overlap
from ftcore_instruct._formats import BadRow
from ftcore_instruct._mixture import Items, quotas
from ftcore_instruct._sources import (
    Reader,
    Settings,
    Source,
    Table,
    open_path,
    open_source,
    open_split,
    settings,
    split_files,
    spool,
)
from ftcore_instruct._templates import Templates

__all__ = ["Splits", "check_system", "load", "load_file"]

SAMPLE = 256  # rows whose tokens are counted, to tell how many fit in a pack


@dataclasses.dataclass(kw_only=True)
class Splits:
    """The items of each split, the quotas of the mixture, and what was kept out of it."""

    items: dict[str, Items]
    quotas: list[int]
    overlap: dict[str, Any]
    no_floor: str = ""  # what is wrong with `floors`: said where they are trained by


def load(cfg: Config, options: Mapping[str, Any], tokenizer: Any) -> Splits:
    """Open what the config names; see the README for the options.

    Raises:
        UserError: a missing file, an unknown format, options that contradict each other or do nothing.
    """
    sources, held = _hold_out(_train(cfg, options), options["held_out"])
    if options["num_tasks"]:
        sources = _choose(sources, options["num_tasks"])
    evaluated, apart = _evaluated(cfg, options), held
    if cfg.data.split is not None:
        if evaluated:
            raise UserError(
                "data.split cuts the training data; take data.validation and data.test away (=null)"
            )
        sources, evaluated = _cut(sources, cfg)
    if held and (cfg.data.split is not None or "validation" not in evaluated):
        evaluated["validation"], apart = [*evaluated.get("validation", ()), *held], []
    no_floor = _no_floor(evaluated, options["floors"])
    for split, part in {"train": sources, **evaluated}.items():
        _limit(part, getattr(cfg.data.limit, split), cfg.data.split_seed)
    against = [*(s for part in evaluated.values() for s in part), *apart]
    report = _keep_apart(sources, against, options)
    sources = [s for s in sources if len(s.kept)]
    if not sources:
        raise UserError("nothing is left to train on: every row is held out, or overlaps what is evaluated")
    templates = Templates(options["templates"])
    counts, epochs = _epochs(sources, cfg, tokenizer if options["pack"] else None)
    train = Items(
        sources,
        templates,
        seed=cfg.data.split_seed,
        needed=[q * epochs for q in counts],
        variants=options["variants"],
    )
    if report.get("rows"):
        did = "taken out" if report["policy"] == "drop" else "found"
        train.remarks = [f"{report['rows']} that overlap evaluated rows {did}"]
    items = {"train": train}
    for split, part in evaluated.items():
        items[split] = _evaluation(part, templates, cfg, options)
    return Splits(items=items, quotas=counts, overlap=report, no_floor=no_floor)


def load_file(path: str, cfg: Config, options: Mapping[str, Any], *, asked: bool) -> Items:
    """The items of a file (or a directory of them), made as those of an evaluated split are.

    Args:
        asked: the rows may lack their answers, which are not read.

    Raises:
        UserError: a missing file, or an unknown format.
    """
    readers = open_path(Path(path).expanduser(), "the file", cfg)
    sources = _as_sources(readers, cfg, options, asked=asked)
    if asked and options["eval_shots"]:
        note("plugin.instruct.eval_shots: rows without answers give no exemplars, so they are asked without")
        options = {**options, "eval_shots": 0}
    return _evaluation(sources, Templates(options["templates"]), cfg, options)


def check_system(splits: Splits) -> None:
    """Say where `system` goes if prompts and tasks are no chats.

    Raises:
        UserError: there are no chats at all.
    """
    forms = [one.form in ("messages", "sharegpt") for part in splits.items.values() for one in part.sources]
    if not any(forms):
        raise UserError(
            "plugin.instruct.system does nothing: tasks and prompts are no chats here; set"
            " plugin.instruct.wrap=true, or take it away"
        )
    if not all(forms):
        note(
            "plugin.instruct.system is for chats; tasks and prompts are none here (plugin.instruct.wrap=true)"
        )


def _no_floor(evaluated: Mapping[str, Sequence[Source]], floors: Mapping[str, float]) -> str:
    """Which floor is of a task that is not evaluated, and does nothing; empty where none is."""
    tasks = {task for part in evaluated.values() for one in part for _, task in _tasks(one)} if floors else ()
    for name in floors:
        if name not in tasks:
            return f"plugin.instruct.floors: no evaluated task is named '{name}'; {nearest(name, tasks)}"
    return ""


def _choose(sources: Sequence[Source], count: int) -> list[Source]:
    """`count` sources, of which a smaller count takes a part, and all whose rows have a rationale.

    Raises:
        UserError: there are fewer.
    """
    drawn = sorted((s for s in sources if not s.has_rationale), key=lambda s: derive("tasks", s.name))
    if count > len(drawn):
        raise UserError(f"plugin.instruct.num_tasks={count}: there are {len(drawn)} sources to choose from")
    return [*drawn[:count], *(s for s in sources if s.has_rationale)]


def _epochs(sources: Sequence[Source], cfg: Config, packed_by: Any) -> tuple[list[int], int]:
    """Rows of each source in an epoch, and epochs at most.

    An epoch is Σ min(rows, cap) rows, or as many as `train.steps` can take where that is less: what is
    never trained on is not formatted. `packed_by` is the tokenizer where rows are packed.
    """
    sizes = [len(s.kept) for s in sources]
    shares = [s.settings.weight for s in sources], [s.settings.cap for s in sources]
    counts = quotas(sizes, *shares)
    if cfg.train.steps is None:
        return counts, math.ceil(cfg.train.epochs)
    taken = cfg.train.steps * cfg.train.batch_size
    if packed_by is not None:
        taken *= _rows_per_pack(sources, counts, cfg, packed_by)
    counts = quotas(sizes, *shares, total=min(sum(counts), taken))
    return counts, max(1, math.ceil(taken / sum(counts)))


def _rows_per_pack(sources: Sequence[Source], counts: Sequence[int], cfg: Config, tokenizer: Any) -> int:
    """Rows that a pack holds at most, by a sample: texts alone, without templates, are shorter than rows."""
    rng = np.random.default_rng(derive(cfg.data.split_seed, "sample"))
    texts = []
    for i in rng.choice(len(sources), SAMPLE, p=np.asarray(counts) / sum(counts)):
        one = sources[i]
        row = int(rng.choice(one.kept))
        try:
            texts.append(" ".join(_overlap.texts(one.read(row))))
        except BadRow:
            continue
    for one in sources:
        one.close()
    tokens = sum(map(len, tokenizer(texts, verbose=False)["input_ids"])) if texts else 0
    length: int = cfg.data.max_length
    return max(1, math.ceil(length * len(texts) / max(1, tokens)))


def _train(cfg: Config, options: Mapping[str, Any]) -> list[Source]:
    """The sources to train on: those of the config, or each file of `data.train`, or the data set."""
    if not options["sources"]:
        return _as_sources(_opened(cfg, "train"), cfg, options)
    if getattr(cfg.data, "train", None) or getattr(cfg.data, "path", None):
        raise UserError(
            "both data.train and plugin.instruct.sources say what to train on;"
            " take one (data=files data.train=null)"
        )
    if cfg.data.streaming:
        raise UserError(
            "data.streaming does nothing for plugin.instruct.sources, which are read row by row from disk;"
            " take it away"
        )
    found = []
    for name, given in options["sources"].items():
        one = settings({} if given is None else given, _defaults(options), str(name))
        for part, rows in open_source(one, str(name), cfg).items():
            found.append(_source(part, rows, one, cfg))
    return found


def _opened(cfg: Config, split: Literal["train", "validation", "test"]) -> dict[str, Reader]:
    """The readers of a split, by source; a stream is written to disk once, by what identifies it."""
    if isinstance(cfg.data, FilesData):
        return (_streamed if cfg.data.streaming else open_split)(split, cfg)
    plain, name = cfg, Path(cfg.data.path).stem
    if not cfg.data.streaming:  # `_limit` draws; of a stream core takes the first rows
        own = dataclasses.replace(cfg.data, split=None, limit=type(cfg.data.limit)())
        plain = dataclasses.replace(cfg, data=own)
    found = data.load(plain).get(split)
    if found is None:
        return {}
    if not cfg.data.streaming:
        return {name: Table(found)}
    import huggingface_hub

    commit = huggingface_hub.HfApi().dataset_info(cfg.data.path, revision=cfg.data.revision).sha
    identity = hashlib.sha256(repr((cfg.data, commit)).encode()).hexdigest()[:16]
    return {name: spool(found, cache_root() / "instruct" / identity, split)}


def _streamed(split: Literal["train", "validation", "test"], cfg: Config) -> dict[str, Reader]:
    """Each streamed file of a split; of all of them `data.limit` takes the first rows, as of one."""
    readers: dict[str, Reader] = {}
    left = getattr(cfg.data.limit, split)
    for name, file in split_files(split, cfg).items():
        if left == 0:
            break
        one = {"train": str(file), "validation": None, "test": None, "split": None}
        own = dataclasses.replace(cfg.data, **one, limit=Limit(train=left))
        alone = dataclasses.replace(cfg, data=own)
        folder = cache_root() / "instruct" / data.fingerprint(alone, None)
        readers[name] = spool(data.load(alone)["train"], folder, split)
        left = None if left is None else left - len(readers[name])
    return readers


def _evaluated(cfg: Config, options: Mapping[str, Any]) -> dict[str, list[Source]]:
    found = {"validation": _opened(cfg, "validation"), "test": _opened(cfg, "test")}
    return {s: _as_sources(readers, cfg, options) for s, readers in found.items() if readers}


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the plugin's options say of every source."""
    return {k: options[k] for k in ("format", "cap", "dry", "few_shot", "shots", "options", "cot", "invert")}


def _as_sources(
    readers: Mapping[str, Reader], cfg: Config, options: Mapping[str, Any], *, asked: bool = False
) -> list[Source]:
    one = settings({}, _defaults(options), "data")
    return [_source(name, rows, one, cfg, asked) for name, rows in readers.items()]


def _source(name: str, rows: Reader, one: Settings, cfg: Config, asked: bool = False) -> Source:
    form, first, columns = one.format, rows[0], (cfg.data.columns.text, cfg.data.columns.target)
    if form == "auto":
        form = _formats.detect(first, *columns, name, answered=not asked)
    source = Source(
        name=name,
        rows=rows,
        kept=np.arange(len(rows), dtype=np.int32),
        settings=one,
        columns=columns,
        form=form,
        is_asked=asked,
    )
    source.has_rationale = any(first.get(column) for column in _formats.RATIONALES)
    source.close()
    return source


def _evaluation(
    sources: Sequence[Source], templates: Templates, cfg: Config, options: Mapping[str, Any]
) -> Items:
    """Sources as they are evaluated: every row once, options listed, `eval_shots` exemplars."""
    chosen = {
        "shots": options["eval_shots"],
        "cot": float(options["eval_cot"]),
        "options": 1.0,
        "invert": 0.0,
    }
    shown = [
        dataclasses.replace(one, settings=dataclasses.replace(one.settings, **chosen)) for one in sources
    ]
    return Items(shown, templates, seed=cfg.data.split_seed, drawn=False)


def _tasks(source: Source) -> Iterator[tuple[int, str]]:
    """The task of each used row."""
    for i in source.kept.tolist():
        yield i, source.task(i)
    source.close()


def _hold_out(sources: Sequence[Source], patterns: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """What is trained on, and the rows of held-out tasks.

    Raises:
        UserError: a pattern that fits no task, or a mixture that is held out as a whole.
    """
    if not patterns:
        return list(sources), []
    trained, held, used = [], [], set()
    for one in sources:
        fits = {}
        for i, task in _tasks(one):
            hit = next((p for p in patterns for n in (task, one.name) if fnmatch.fnmatchcase(n, p)), None)
            if hit is not None:
                used.add(hit)
            fits[i] = hit is not None
        mask = np.fromiter(fits.values(), bool)
        held += [dataclasses.replace(one, kept=one.kept[mask])] if mask.any() else []
        trained += [dataclasses.replace(one, kept=one.kept[~mask])] if not mask.all() else []
    if missing := [p for p in patterns if p not in used]:
        raise UserError(f"plugin.instruct.held_out: no task is named '{missing[0]}'")
    return trained, held


def _cut(sources: Sequence[Source], cfg: Config) -> tuple[list[Source], dict[str, list[Source]]]:
    """`data.split`: each source cut into the three splits by the shares."""
    parts: dict[str, list[Source]] = {"train": [], "validation": [], "test": []}
    for one in sources:
        rng = np.random.default_rng(derive(cfg.data.split_seed, "split", one.name))
        rows = one.kept[rng.permutation(len(one.kept))]
        ends = np.rint(np.cumsum(cfg.data.split) * len(rows)).astype(int)
        for split, part in zip(parts, np.split(rows, ends[:-1]), strict=True):
            if len(part):
                parts[split].append(dataclasses.replace(one, kept=np.sort(part)))
    return parts.pop("train"), {s: p for s, p in parts.items() if p}


def _limit(sources: Sequence[Source], limit: int | None, seed: int) -> None:
    """Keep `limit` rows of a split, drawn over all of its sources."""
    total = sum(len(s.kept) for s in sources)
    if limit is None or limit >= total:
        return
    chosen = np.sort(np.random.default_rng(derive(seed, "limit")).permutation(total)[:limit])
    start = 0
    for one in sources:
        inside = chosen[(chosen >= start) & (chosen < start + len(one.kept))] - start
        start += len(one.kept)
        one.kept = one.kept[inside]


def _keep_apart(
    sources: Sequence[Source], against: Sequence[Source], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Take rows that overlap evaluated ones out of `sources` (or report them); returns the report.

    The search is made once for the same data and options, and kept in the cache.

    Raises:
        UserError: there are such rows, and `overlap=error`.
    """
    if options["overlap"] == "off" or not against:
        return {}
    n, share = options["overlap_words"], options["overlap_share"]
    digest = hashlib.sha256(repr((n, share)).encode())
    for part in (sources, against):
        for one in part:
            digest.update(repr((one.name, one.rows.fingerprint, one.form, one.columns)).encode())
            digest.update(one.kept.astype("<i8").tobytes())
    file = cache_root() / "instruct" / f"overlap-{digest.hexdigest()[:24]}.json"
    if file.is_file():
        found = json.loads(file.read_text())
    else:
        found = _search(sources, against, _overlap.Overlap(n=n, share=share))
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{derive(repr(found))}")
        scratch.write_text(json.dumps(found))
        scratch.replace(file)
    rows, report = found["rows"], found["report"]
    if options["overlap"] == "error" and report["rows"]:
        raise UserError(
            f"{report['rows']} training rows overlap what is evaluated (the first: {report['first'][0]});"
            " plugin.instruct.overlap=drop takes them out"
        )
    if options["overlap"] == "drop":
        for one in sources:
            one.kept = np.setdiff1d(
                one.kept, np.asarray(rows.get(one.name, []), np.int64), assume_unique=True
            )
    return {"policy": options["overlap"], **report}


def _search(sources: Sequence[Source], against: Sequence[Source], known: _overlap.Overlap) -> dict[str, Any]:
    places = []
    for one in against:
        for i, parts, task in _compared(one):
            known.add(parts, task)
            places.append(f"{one.name} row {i}")
    rows: dict[str, list[int]] = {}
    by_task: Counter[str] = Counter()
    touched: set[int] = set()
    first: list[str] = []
    for one in sources:
        compared = _compared(one)
        numbers: list[int] = []

        def texts(numbers: list[int] = numbers, compared: Any = compared) -> Iterator[list[str]]:
            for i, parts, _ in compared:
                numbers.append(i)
                yield parts

        for hits in known.hits(texts()):
            if not hits:
                continue
            rows.setdefault(one.name, []).append(numbers[-1])
            by_task.update({known.names[h] for h in hits})
            touched.update(hits)
            if len(first) < 5:
                first.append(f"{one.name} row {numbers[-1]} and {places[hits[0]]}")
    evaluated = Counter(known.names)
    report = {
        "words": known.n,
        "share": known.share,
        "evaluated": sum(evaluated.values()),
        "evaluated_overlapping": len(touched),
        "rows": sum(map(len, rows.values())),
        "by_source": {name: len(found) for name, found in rows.items()},
        "by_evaluated_task": dict(by_task),
        "first": first,
    }
    return {"rows": rows, "report": report}


def _compared(source: Source) -> Iterator[tuple[int, list[str], str]]:
    """(row, texts, task) of the rows that can be read."""
    for i in source.kept.tolist():
        try:
            found = source.read(i)
        except BadRow:
            continue
        yield i, _overlap.texts(found), source.task(i)
    source.close()
