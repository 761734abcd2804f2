"""A prompt before each text."""

from ftcore import hookimpl, plugin


@plugin(api=1)
class Prompt:
    """Ask a question before each text of a classification."""

    question: str = "Which is it? "

    @hookimpl
    def format_examples(self, examples, tokenizer, cfg, labels):
        rows = []
        for example in examples:
            ids = tokenizer(self.question + str(example["text"]))["input_ids"]
            cut = max(0, len(ids) - cfg.data.max_length)  # the audit fails the run where that is too often
            rows.append(
                {
                    "input_ids": ids[: len(ids) - cut],
                    "labels": labels.index(str(example["label"])),
                    "truncated": cut,
                }
            )
        return rows
