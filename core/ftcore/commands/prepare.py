"""`ftcore prepare`: all that a run reads, fetched, formatted and checked; then it can run offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.commands import Parser, parse_run
from ftcore.errors import UserError

if TYPE_CHECKING:
    from ftcore.config import Config
    from ftcore.hooks import Hooks

__all__ = ["main"]

MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def main(arguments: Sequence[str]) -> int:
    """Fetch the model, format and audit the data, and say what pins both."""
    parser = Parser(
        prog="ftcore prepare",
        description="Download, tokenise and audit what a run needs; then offline=true asks no network.",
    )
    options = parse_run(parser, arguments)
    from ftcore.compose import compose
    from ftcore.job import build_hooks
    from ftcore.prepare import cache_root, prepare

    cfg = compose(options.overrides)
    hooks = build_hooks(cfg)
    pins = _fetch(cfg, hooks)
    prepared = prepare(hooks, hooks.load_tokenizer())
    for split, audit in prepared.audits.items():
        print(audit.describe(split))
    print(f"data   {cache_root() / 'data' / prepared.fingerprint}")
    for pin in pins:
        print(f"pin    {pin}")
    print("ready: the same arguments with offline=true ask no network")
    return 0


def _fetch(cfg: Config, hooks: Hooks) -> list[str]:
    """Download the model where it is the hub's; the settings that pin what `main` is now."""
    from ftcore.config import HubData
    from ftcore.models import locate, tiny_name

    pins = []
    if tiny_name(cfg.model) is None and hooks.implemented("load_model") == ["core"]:
        path = locate(cfg.model)
        if not Path(path).is_dir():
            pins.append(f"model.revision={_download(path, cfg)}")
    if isinstance(cfg.data, HubData) and not cfg.offline and not Path(cfg.data.path).is_dir():
        from huggingface_hub import HfApi

        pins.append(f"data.revision={HfApi().dataset_info(cfg.data.path, revision=cfg.data.revision).sha}")
    return pins


def _download(path: str, cfg: Config) -> str:
    """Fetch a model's files (each once, whoever else wants them); returns the commit."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            path,
            revision=cfg.model.revision,
            allow_patterns=MODEL_FILES,
            local_files_only=cfg.offline,
        )
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model.path={path} can't be fetched: {reason}") from error
    return Path(folder).name
