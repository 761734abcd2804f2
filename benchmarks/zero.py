"""ZeRO: memory of the states by stage against the theory, and ftcore's step against a bare DeepSpeed loop.

    python benchmarks/zero.py             both, on 2 ranks
    python benchmarks/zero.py --ranks 4   memory only

Ranks are processes of this machine (gloo, CPU). Memory is the sum of all tensors alive before the third step,
reduction buffers left out; the theory is that of `ftcore plan`. Both loops train the same rows, by turns.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LABELS = ("yes", "no")
ROWS = [{"text": f"row {i} " + "abc" * (i % 9), "label": LABELS[i % 2]} for i in range(64)]
HIDDEN, LAYERS = 256, 8  # 6.4M parameters and a vocabulary of bytes


def model_folder(folder: Path) -> Path:
    """A BERT of random weights, large enough for its states to be what memory holds."""
    from transformers import BertConfig, BertForSequenceClassification

    from ftcore import tiny

    tokenizer = tiny.tokenizer("tiny_bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        id2label=dict(enumerate(sorted(LABELS))),  # those of the data, so that the head is kept
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "model"


def open_job(folder: Path, stage: int, mixout: bool, micro: int) -> Any:
    from ftcore.config import from_plain
    from ftcore.job import open_job as open_
    from ftcore.screen import Screen
    from ftcore.signals import StopFlag

    cfg = from_plain(
        {
            "model": {"path": str(folder / "model"), "dropout": 0.0},
            "data": {"source": "files", "train": str(folder / "train.jsonl")},
            "train": {"batch_size": 16, "micro_batch_size": micro, "steps": 1000},
            "optim": {"schedule": "constant", "warmup": 0},
            "trainer": {"strategy": "deepspeed", "stage": stage},
            "plugin": {"mixout": {"p": 0.5}} if mixout else {},
        }
    )
    return open_(cfg, folder, lambda _: Screen(False), StopFlag())


def tensors() -> dict[int, int]:
    """Bytes of every tensor storage alive, by address."""
    import torch

    gc.collect()
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def measure_memory(folder: Path, rank: int, ranks: int) -> None:
    """Bytes of states on this rank after the gradients of a step are there, and the estimate, by stage."""
    from ftcore.loop import run_step
    from ftcore_deepspeed import _memory

    # Before ZeRO-3 splits all that is made.
    parameters = [(p.numel(), p.requires_grad) for p in _outline(folder).parameters()]
    for mixout in (False, True):
        for stage in range(4):
            before = tensors()
            job = open_job(folder, stage, mixout, 4)
            sampler = job.hooks.build_sampler(job.prepared.splits["train"], 16, 0)
            job.hooks.on_train_start(job.state(1000))
            seen: list[dict[int, int]] = []
            inner = job.strategy.clip

            def clip(limit: Any, inner: Any = inner, seen: Any = seen) -> Any:
                seen.append(tensors())  # weights, gradients, moments: all are alive here
                return inner(limit)

            job.strategy.clip = clip
            for _ in range(3):
                run_step(job, sampler, 1000)
                job.progress.step += 1
            held = sum(size for at, size in seen[-1].items() if before.get(at) != size)
            buffer = _memory.BUCKET * 4
            held -= buffer * sum(size == buffer for size in seen[-1].values())
            described = [p.instance.describe() for p in job.hooks.plugins]
            kept = sum(d.get("kept_parameters", 0) for d in described)
            theory = _memory.estimate(_memory.count(parameters, kept), ranks, (stage, False, False))["device"]
            if rank == 0:
                name = "mixout" if mixout else "plain"
                line = f"stage {stage}  {name:<8}{held / 1e6:9.1f} MB   theory {theory / 1e6:9.1f} MB"
                print(f"{line}   {held / theory:.3f}", flush=True)
            job.strategy.close()
            del job, sampler, inner, clip, seen


def _outline(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder / "model"))


def bare_engine(folder: Path, stage: int, micro: int) -> Any:
    """What a script of one's own would have: DeepSpeed does it all."""
    import deepspeed
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases and norms, as most scripts do
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def measure_speed(folder: Path, rank: int, ranks: int) -> None:
    """ftcore's step over a bare `deepspeed.initialize` loop's, by turns; stages 2 and 3, both clip at 1."""
    import torch
    from interleaved import compare

    from ftcore.batches import micro_batches
    from ftcore.loop import run_step

    for stage in (2, 3):
        job = open_job(folder, stage, False, 16 // ranks)
        sampler = job.hooks.build_sampler(job.prepared.splits["train"], 16, 0)
        job.hooks.on_train_start(job.state(1000))
        prepared = [micro_batches(job, sampler(0, i), 0) for i in range(sampler.steps_per_epoch)]
        engine, count = bare_engine(folder, stage, 16 // ranks), [0]
        engine.train()
        job.strategy.model.train()
        losses: dict[str, float] = {}

        def ours(job: Any = job, sampler: Any = sampler, losses: Any = losses) -> float:
            begin = time.perf_counter()
            losses["ftcore"] = float(run_step(job, sampler, 1000)["loss"][0])
            job.progress.step += 1
            return 1000 * (time.perf_counter() - begin)

        def bare(engine: Any = engine, prepared: Any = prepared, count: Any = count) -> float:
            (batch,) = prepared[count[0] % len(prepared)]
            begin = time.perf_counter()
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = engine(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
            engine.backward(loss)
            engine.step()
            float(loss)
            count[0] += 1
            return 1000 * (time.perf_counter() - begin)

        if rank == 0:
            print(f"stage {stage}, {ranks} ranks, 16 rows a step: one step", flush=True)
            compare({"bare loop": bare, "ftcore": ours}, rounds=30)
        else:
            with open(os.devnull, "w") as nothing:  # noqa: PTH123
                sys.stdout, shown = nothing, sys.stdout
                compare({"bare loop": bare, "ftcore": ours}, rounds=30)
                sys.stdout = shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        measure_memory(options.as_rank, rank, options.ranks)
        if options.ranks == 2:
            measure_speed(options.as_rank, rank, options.ranks)
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder(folder)
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(options.ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"FTCORE_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, "--ranks", str(options.ranks), "--as-rank", name]
        ranks = [
            subprocess.Popen(command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(options.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
        sys.exit(max(codes))


if __name__ == "__main__":
    main()
