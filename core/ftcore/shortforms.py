"""What people type for short, as full settings: `data=reviews.csv`, `data=dir/`, `model=org/name`.

Also quotes paths for Hydra, whose grammar gives spaces, commas, parentheses and `=` meanings of their own.
Nothing here imports Hydra.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ftcore.errors import UserError
from ftcore.readers import SUFFIXES

__all__ = ["expand"]

PATHS = (
    "data.train",
    "data.validation",
    "data.test",
    "data.path",
    "model.path",
    "model.add_tokens",
)
"""Keys that take a path as it is typed."""

SPLIT = "data.split=[0.8,0.1,0.1]"
SPLIT_FILES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def expand(
    arguments: Sequence[str], choices: Mapping[str, Iterable[str]], *, sweep: bool = False
) -> tuple[list[str], list[str]]:
    """The arguments in full, and a note for each short form.

    Args:
        choices: the names of the groups `data` and `model`; a name goes before a file that is called so.
        sweep: several values, with commas between, may be given for one key.

    Raises:
        UserError: `data=` or `model=` something that looks like a path, but is not there.
    """
    full, notes = [], []
    keys = {a.partition("=")[0].lstrip("+") for a in arguments}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("data", "model"):
            said = _data if key == "data" else _model
            short = _is_short(value, choices[key], sweep) and said(_values(value, sweep), keys)
            full += short or [argument]
            if short:
                notes.append(f"{argument}  means  {' '.join(short)}")
        elif equals and key.lstrip("+") in PATHS:
            full.append(f"{key}={','.join(map(_quote, _values(value, sweep)))}")
        else:
            full.append(argument)
    return full, notes


def _values(value: str, sweep: bool) -> list[str]:
    """The values of a sweep; a path that has commas and is there is one value."""
    return value.split(",") if sweep and not Path(value).expanduser().exists() else [value]


def _is_short(value: str, names: Iterable[str], sweep: bool) -> bool:
    """Whether a value of `data=` or `model=` names a file, a directory or a repository."""
    return not set(_values(value, sweep)) & {*names, "null", ""}


def _data(values: Sequence[str], given: set[str]) -> list[str]:
    """`data=PATH`: a file, or a directory of them, which is cut where it is not in parts already."""
    paths = [Path(value).expanduser() for value in values]
    if not all(path.exists() for path in paths):
        for value in values:
            if re.search(r"[./\\~ ]", value) and not Path(value).expanduser().exists():
                path = Path(value).expanduser()
                close = difflib.get_close_matches(path.name, [f.name for f in path.parent.glob("*")])
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UserError(f"data={value}: no such file or directory{hint}")
        return []  # Hydra names the choices
    parts = _parts(paths[0]) if len(paths) == 1 and paths[0].is_dir() else {}
    if not parts:
        parts = {"train": ",".join(map(_quote, values))}
    else:
        parts = {split: _quote(path) for split, path in parts.items()}
    short = ["data=files", *(f"data.{s}={p}" for s, p in parts.items() if f"data.{s}" not in given)]
    cut = {"data.split", "data.validation", "data.test", "data.streaming"}
    return short if len(parts) > 1 or given & cut else [*short, SPLIT]


def _parts(directory: Path) -> dict[str, str]:
    """The files (or directories) of a directory that are called as splits are; empty without `train`."""
    found = {}
    for split, names in SPLIT_FILES.items():
        for path in sorted(directory.iterdir()):
            known = path.suffix.lower() in SUFFIXES or path.is_dir()
            stem = path.name.removesuffix(path.suffix).lower().removesuffix("-00000-of-00001")
            if known and stem in names and split not in found:
                found[split] = str(path)
            elif known and (
                stem in names or (path.is_file() and re.match(rf"({'|'.join(names)})[^a-z]", stem))
            ):
                rival = f", or {Path(found[split]).name}" if split in found else ""
                raise UserError(
                    f"data={directory}: is {path.name} its {split} split{rival}? Say which are: data=files"
                    " data.train=... data.validation=... data.test=... (each a file, or a directory of them)"
                )
    return found if "train" in found else {}


def _model(values: Sequence[str], given: set[str]) -> list[str]:
    """`model=PATH`: a directory (of a finished run: its `model/`), or a hub's `org/name`."""
    if not all("/" in value or Path(value).expanduser().is_dir() for value in values):
        return []  # Hydra names the choices
    paths = [
        _of_run(value) if (Path(value).expanduser() / "config.yaml").is_file() else value for value in values
    ]
    return ["model=pretrained", f"model.path={','.join(map(_quote, paths))}"]


def _of_run(value: str) -> str:
    model = str(Path(value, "model"))
    if not Path(model).expanduser().is_dir():
        raise UserError(f"model={value}: that run has no model/: it has not finished, was pruned, or lost it")
    return model


def _quote(value: str) -> str:
    """A path as Hydra reads it: in quotes, where it holds what the grammar gives a meaning."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or re.fullmatch(r"[\w./:@-]*", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes are doubled before a quote only
    ending = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - ending :]}'"
