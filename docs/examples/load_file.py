"""Files of questions alone, a line each."""

from pathlib import Path

from ftcore import hookimpl, plugin


@plugin(api=1)
class Lines:
    """Let `ftcore predict RUN questions.txt` answer each line; core reads any other file."""

    @hookimpl
    def load_file(self, path, cfg):
        if not path.endswith(".txt"):
            return None
        from datasets import Dataset

        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([{cfg.data.columns.text: line} for line in lines])
