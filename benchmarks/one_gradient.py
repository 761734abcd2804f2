"""The gradient norm of the same 16 rows, split four ways: ftcore, and transformers' Trainer beside it.

    python benchmarks/one_gradient.py [--svg docs/images/one_gradient.svg]

Needs the peer: `pip install accelerate`. Tiny BERT, dropout off, the first step; both clip nothing away.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SPLITS = {"16 x 1": (16, 1), "4 x 4": (4, 1), "1 x 16": (1, 1), "2 ranks of 8": (8, 2)}
RUN = ["model=tiny_bert", "model.dropout=0", "train.steps=1", "data.validation=null", "data.test=null"]


def ftcore(micro: int, ranks: int, directory: Path) -> float:
    """Gradient norm that ftcore logs for step 1."""
    command = [sys.executable, "-m", "ftcore", *RUN, f"train.micro_batch_size={micro}"]
    command += ["trainer=ddp", f"trainer.devices={ranks}"] if ranks > 1 else []
    out = directory / f"{micro}-{ranks}"
    subprocess.run([*command, f"hydra.run.dir={out}"], check=True, capture_output=True)
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return float(record["grad_norm"])


def trainer(micro: int, ranks: int, directory: Path) -> float:
    """Gradient norm that Trainer logs, accumulating to 16 rows."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    out = directory / f"hf-{micro}-{ranks}"
    command = [sys.executable, *launcher, __file__, "--peer", str(micro), str(ranks), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return float((out / "norm").read_text())


def peer(micro: int, ranks: int, out: Path) -> None:
    """Train one step of 16 fixed rows by Trainer and write the gradient norm that it logs."""
    import transformers
    from datasets import Dataset

    from ftcore import tiny

    tokenizer, config = tiny.tokenizer("tiny_bert"), tiny.config("tiny_bert")
    config.num_labels = 8
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    rows = [{**tokenizer("abc " * (i + 1)), "labels": i % 8} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=16 // (micro * ranks),
        max_steps=1,
        logging_steps=1,
        max_grad_norm=1e9,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    run = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    run.train()
    norms = [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]
    if run.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        (out / "norm").write_text(str(norms[0]))


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { fill: #59636e; font-size: 12px }
.ftcore { fill: #3455db } .trainer { fill: #b35900 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } .ftcore { fill: #7d97ff } .trainer { fill: #f0a04b }
}"""


def chart(norms: dict[str, tuple[float, float]]) -> str:
    """Bars of both columns, each relative to its own first: what a split should not change."""
    first = next(iter(norms.values()))
    ratios = {
        name: [value / start for value, start in zip(pair, first, strict=True)]
        for name, pair in norms.items()
    }
    said = "; ".join(f"{n}: ftcore {a:.3g}, HF Trainer {b:.3g}" for n, (a, b) in ratios.items())
    top, most, parts = 34, max(max(r) for r in ratios.values()), []
    for column, title in enumerate(("ftcore", "HF Trainer")):
        left, kind = 20 + 330 * column, title.split()[-1].lower()
        parts.append(f'<text x="{left}" y="18" font-weight="600">{title}</text>')
        for row, (name, values) in enumerate(ratios.items()):
            y, width = top + 26 * row, 2 + 170 * values[column] / most
            parts += [
                f'<text class="small" x="{left}" y="{y + 13}">{name}</text>',
                f'<rect class="{kind}" x="{left + 90}" y="{y}" width="{width:.1f}" height="17"/>',
                f'<text x="{left + 96 + width:.1f}" y="{y + 13}">{values[column]:.3g}x</text>',
            ]
    height = top + 26 * len(ratios) + 24
    parts.append(
        f'<text class="small" x="20" y="{height - 8}">Gradient norm of the same 16 rows, by micro-batch x'
        " accumulation; 1x is the first split.</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 690 {height}" role="img" aria-label="{said}">'
        f"<title>One gradient for any split of the batch</title><desc>{said}</desc><style>{STYLE}</style>"
        f"{''.join(parts)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="a chart of it")
    options = parser.parse_args()
    if options.peer:
        micro, ranks, out = options.peer
        peer(int(micro), int(ranks), Path(out))
        return
    norms = {}
    with tempfile.TemporaryDirectory() as directory:
        print(f"{'micro x accumulation':<22}{'ftcore':>12}{'Trainer':>12}")
        for name, (micro, ranks) in SPLITS.items():
            ours, theirs = (f(micro, ranks, Path(directory)) for f in (ftcore, trainer))
            norms[name] = ours, theirs
            print(f"{name:<22}{ours:12.7f}{theirs:12.7f}")
    if options.svg:
        options.svg.write_text(chart(norms))


if __name__ == "__main__":
    main()
