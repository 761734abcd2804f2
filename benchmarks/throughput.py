"""Useful (non-padding) tokens a second on the demo data, against transformers.Trainer with its defaults.

    python benchmarks/throughput.py

Needs the peer: `pip install accelerate`. The same model, rows and batch size; ftcore batches by length.
"""

import argparse

import torch
from interleaved import compare
from peers import ftcore_steps, open_quiet, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=13, help="optimiser steps a block (half an epoch)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, batches of 16 rows")
    job = open_quiet(["train.batch_size=16"])
    compare(
        {
            "transformers Trainer": trainer(job, options.steps, per_token=True),
            "ftcore": ftcore_steps(job, options.steps, per_token=True),
        },
        rounds=options.rounds,
        unit="tokens/s",
        digits=0,
    )


if __name__ == "__main__":
    main()
