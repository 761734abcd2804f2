"""What the loop costs beside the model: milliseconds a step over a bare loop, with 5 plugins that do nothing.

    python benchmarks/loop_overhead.py [--demo-model]

Peer: transformers.Trainer in the same run (`pip install accelerate`; left out where it is not installed).
"""

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from interleaved import compare
from peers import bare, ftcore_steps, open_quiet, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo-model", action="store_true", help="the demo model on the demo data")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.demo_model:
        overrides, steps = ["train.batch_size=16"], 5
    else:
        data = Path(tempfile.mkdtemp()) / "train.jsonl"
        data.write_text("".join(json.dumps({"text": "abcdef", "label": i % 2}) + "\n" for i in range(64)))
        overrides = ["model=tiny_bert", "data=files", f"data.train={data}", "train.batch_size=1"]
        steps = 200
    job = open_quiet(overrides, idle_plugins=5)
    device = job.strategy.device
    where = (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )
    print(f"torch {torch.__version__}, {where}, fp32, {steps} steps a block")
    variants = {"bare loop": bare(job, steps), "ftcore, 5 plugins": ftcore_steps(job, steps)}
    if find_spec("accelerate"):
        variants["transformers Trainer"] = trainer(job, steps)
    compare(variants, rounds=options.rounds, unit="ms/step")


if __name__ == "__main__":
    main()
