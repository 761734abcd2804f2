"""`ftcore new-plugin`: a package that works as it stands, from the templates beside this file, offline."""

import argparse
import keyword
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from string import Template

from ftcore.commands import Parser
from ftcore.errors import UserError
from ftcore.plugins import API, installed

__all__ = ["KINDS", "files", "new_plugin"]

TEMPLATES = Path(__file__).resolve().parent / "templates"
KINDS = ("loss", "regularizer", "data", "evaluation", "strategy")
SHARED = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "LICENSE": "LICENSE.tmpl",
    ".github/workflows/test.yml": "test.yml.tmpl",
}


def new_plugin(arguments: Sequence[str]) -> int:
    """Write a new plugin's package into the current directory."""
    parser = Parser(
        prog="ftcore new-plugin",
        description="Make a plugin's package: it installs, passes its tests, and trains.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", help="its name, as in +plugin=NAME: lower-case letters, digits and _")
    parser.add_argument("--kind", choices=KINDS, default="loss", help="what it does")
    options = parser.parse_args(arguments)
    _check_name(options.name)
    root = Path(f"ftcore-{options.name.replace('_', '-')}")
    if root.exists():
        raise UserError(f"{root} exists already; choose another name, or move it away")
    for path, text in files(options.name, options.kind).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    choice = f"trainer={options.name}" if options.kind == "strategy" else f"+plugin={options.name}"
    print(
        f"{root}: a plugin of the kind '{options.kind}'. Next:\n\n"
        f"  pip install -e ./{root}\n  pytest {root}\n  ftcore check {choice} model=tiny_bert\n"
        f"  ftcore {choice} model=tiny_bert train.steps=20"
    )
    return 0


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name.endswith("_") or keyword.iskeyword(name):
        raise UserError(f"a plugin's name has lower-case letters, digits and _, got '{name}'; e.g. my_loss")
    if name in ("core", "single", "ddp"):
        raise UserError(f"'{name}' is ftcore's own name; choose another")
    if name in installed():
        owner = installed()[name][0].dist
        raise UserError(
            f"a plugin '{name}' is installed already ({owner and owner.name}); choose another name"
        )


def files(name: str, kind: str) -> dict[str, str]:
    """Path in the new package to its text."""
    words = {
        "name": name,
        "dist": f"ftcore-{name.replace('_', '-')}",
        "package": f"ftcore_{name}",
        "cls": "".join(word.capitalize() for word in name.split("_")),
        "choice": f"trainer={name}" if kind == "strategy" else f"+plugin={name}",
        "group": "trainer" if kind == "strategy" else "plugin",
        "kind": kind,
        "api": str(API),
        "year": str(date.today().year),
    }
    package = f"src/{words['package']}"
    sources = {
        **SHARED,
        f"{package}/__init__.py": f"{kind}.py.tmpl",
        f"{package}/conf/{words['group']}/{name}.yaml": f"{kind}.yaml.tmpl",
        "tests/test_conformance.py": f"{kind}.test.tmpl",
    }
    made = {
        path: Template((TEMPLATES / source).read_text()).substitute(words) for path, source in sources.items()
    }
    return made | {f"{package}/py.typed": ""}
