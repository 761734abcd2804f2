"""The texts of test rows, where they still lie where the run read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftcore
from ftcore_report._runs import Run

__all__ = ["test_texts"]

LONGEST = 300  # characters shown


def test_texts(run: Run, rows: Sequence[int], labels: Sequence[Any]) -> list[str] | None:
    """Texts of the file's rows, or None: shown only where every row has the label that the run saw there."""
    path, text = str(run.config.get("data.test") or ""), run.config.get("data.columns.text", "text")
    if path.startswith("ftcore:"):
        path = str(Path(ftcore.__file__).parent / path.removeprefix("ftcore:"))
    label, second = run.config.get("data.columns.label", "label"), run.config.get("data.columns.text_pair")
    try:
        examples = _read(Path(path)) if path else []
        picked = [examples[i] for i in rows]
        if not picked or [str(e[label]) for e in picked] != [str(y) for y in labels]:
            return None
        texts = [" | ".join(str(e[name]) for name in (text, second) if name) for e in picked]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return [t if len(t) <= LONGEST else t[: LONGEST - 1] + "…" for t in texts]


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; `ValueError` (pyarrow's too) where it is none of these."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers: dict[str, Any] = {
        ".jsonl": pyarrow.json.read_json,
        ".json": pyarrow.json.read_json,
        ".csv": pyarrow.csv.read_csv,
        ".parquet": pyarrow.parquet.read_table,
    }
    if path.suffix not in readers:
        raise ValueError(f"no reader for '{path.suffix}'")
    rows: list[dict[str, Any]] = readers[path.suffix](path).to_pylist()
    return rows
