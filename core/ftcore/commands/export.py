"""`ftcore export`: a run's model elsewhere, in another dtype, in shards, or on the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftcore.commands import Parser
from ftcore.errors import UserError

__all__ = ["main"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUB = "hub:"


def main(arguments: Sequence[str]) -> int:
    """Write a finished run's model to a new directory, or push it to the hub."""
    parser = Parser(
        prog="ftcore export",
        description="Write a run's model, tokenizer and card to a directory or to the hub.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's directory")
    parser.add_argument("--to", required=True, metavar="DIR|hub:ORG/NAME", help="where to; a new directory")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights")
    parser.add_argument("--shard-size", default="5GB", help="largest weights file (5GB, 500MB, ...)")
    parser.add_argument("--public", action="store_true", help="a hub repository that all can read")
    options = parser.parse_args(arguments)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run} is no run: it has no config.yaml")
    from ftcore.saved import model_of

    folder = model_of(options.run)
    if options.to.startswith(HUB):
        with tempfile.TemporaryDirectory(prefix="ftcore-export-") as parcel:
            _write(folder, Path(parcel), options.dtype, options.shard_size)
            print(_push(Path(parcel), options.to.removeprefix(HUB), private=not options.public))
        return 0
    target = Path(options.to).expanduser().absolute()
    if target.exists():
        raise UserError(f"--to {target} is there already; name a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"can't write to {target.parent}: {error.strerror}") from error
    try:
        _write(folder, scratch, options.dtype, options.shard_size)
        scratch.chmod(0o755)  # a temporary directory is its owner's alone
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(f.stat().st_size for f in target.iterdir())
    files = len(list(target.glob("*.safetensors")))
    print(f"{options.dtype}, {files} file(s) of weights, {size / 1e6:,.1f} MB  ->  {target}")
    return 0


def _write(folder: Path, target: Path, dtype: str, shard_size: str) -> None:
    """The model in `dtype`; every file beside the weights (tokenizer, template, card) as it is."""
    import torch
    import transformers

    from ftcore.models import save

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    loader: Any = getattr(transformers, name, None)
    if loader is None:
        raise UserError(
            f"{folder} is a {name}, which is no class of transformers; copy the directory as it is"
        )
    model = loader.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype]))
    try:
        save(model, target, max_shard_size=shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size {shard_size}: {error}") from error
    for file in sorted(folder.iterdir()):
        if not (target / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)


def _push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload to the hub; returns the address.

    Raises:
        UserError: no such right, or no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by ftcore export"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"can't push to {repository}: {reason} (`hf auth login` signs in)") from error
    return str(commit.repo_url)
