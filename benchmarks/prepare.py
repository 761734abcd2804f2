"""Rows formatted by one process and by several: `data.workers`.

    python benchmarks/prepare.py [--rows 20000] [--workers 2] [--rounds 7]

Chats of four turns by ftcore-instruct, whose template takes time, and texts with a label, which take little:
reading, checking and writing stay in one process. The cache is emptied each time; nothing else runs.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from interleaved import compare

from ftcore.compose import compose
from ftcore.job import build_hooks
from ftcore.prepare import cache_root, prepare

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "brew")
KINDS = {
    "chats": ["+plugin=instruct", "model=tiny_llama", "plugin.instruct.overlap=off", "data.max_length=2048"],
    "labels": ["model=tiny_bert", "data.max_length=512"],
}


def make_rows(kind: str, count: int) -> list[dict[str, object]]:
    """Rows of texts of 25 and 40 words."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    if kind == "labels":
        return [{"text": text(25), "label": "ab"[i % 2]} for i in range(count)]
    turns = (("user", 25), ("assistant", 40)) * 2
    return [{"messages": [{"role": role, "content": text(n)} for role, n in turns]} for _ in range(count)]


def formatting(overrides: list[str]) -> Callable[[], float]:
    """Seconds from files to rows on disk."""
    hooks = build_hooks(compose(overrides))
    tokenizer = hooks.load_tokenizer()

    def run() -> float:
        shutil.rmtree(cache_root() / "data", ignore_errors=True)
        start = time.perf_counter()
        prepare(hooks, tokenizer)
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftcore-bench-") as folder:
        os.environ["FTCORE_CACHE"] = folder
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line has it
        for kind, overrides in KINDS.items():
            path = Path(folder, f"{kind}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(kind, options.rows)))
            data = ["data=files", f"data.train={path}", "data.validation=null"]
            print(f"{options.rows:,} {kind}")
            compare(
                {
                    f"{n} worker(s)": formatting([*overrides, *data, f"data.workers={n}"])
                    for n in (1, options.workers)
                },
                rounds=options.rounds,
                unit="s",
                digits=1,
            )


if __name__ == "__main__":
    main()
