"""Subcommands. Each takes its arguments and returns an exit code.

Here are `plugins` and `resume`; each other one is a module with a `main`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ftcore.errors import UserError

__all__ = ["Parser", "parse_run", "plugins", "resume"]


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows how)")


def parse_run(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command that takes a run's arguments (`overrides`), `--config-dir` among them."""
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a directory of your own configs")
    parser.add_argument("overrides", nargs="*", default=[], help="the run's own arguments (key=value)")
    options = parser.parse_intermixed_args(arguments)
    if (folder := options.config_dir) is not None:
        if not folder.is_dir():
            raise UserError(f"--config-dir: no such directory: {folder}")
        options.overrides.append(f"hydra.searchpath=['file://{folder.absolute()}']")
    return options


def plugins(arguments: Sequence[str]) -> int:
    """List the installed plugins; a broken one is listed with its error and harms nothing."""
    parser = Parser(prog="ftcore plugins", description="List the installed plugins.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from ftcore.plugins import installed

    rows: list[dict[str, Any]] = []
    for name, points in installed().items():
        for point in points:
            dist = point.dist
            row = {
                "name": name,
                "distribution": dist.name if dist else point.value,
                "version": dist.version if dist else "",
            }
            try:
                cls = point.load()
                row["summary"] = (cls.__doc__ or "").strip().partition("\n")[0]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        what = row.get("summary") or row.get("error")
        print(f"{row['name']:<16}{row['distribution']} {row['version']}  {what}")
    if not rows:
        print("no plugins are installed; they are pip packages with an entry point in ftcore.plugins")
    return 0


def resume(arguments: Sequence[str]) -> int:
    """Go on with an unfinished run from its newest valid checkpoint."""
    parser = Parser(prog="ftcore resume", description="Go on with an unfinished run.")
    parser.add_argument("run_dir", type=Path, help="its directory (runs/latest is the newest)")
    parser.add_argument(
        "trainer", nargs="*", default=[], help="on other devices: trainer=ddp trainer.devices=2"
    )
    options = parser.parse_args(arguments)
    from ftcore.run import read_config, run

    directory = options.run_dir.resolve()
    cfg = read_config(directory)
    if other := [o for o in options.trainer if not o.startswith(("trainer=", "trainer."))]:
        raise UserError(f"resume takes another trainer and nothing else, got '{other[0]}'")
    if options.trainer:
        from ftcore.compose import compose

        cfg.trainer = compose(options.trainer).trainer
    run(cfg, directory)
    return 0
