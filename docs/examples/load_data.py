"""Data that no file has."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Parity:
    """Train on numbers in words: is it even or odd?"""

    rows: int = 48

    @hookimpl
    def load_data(self):
        from datasets import Dataset

        rows = [{"text": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(self.rows)]
        return {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:8])}
