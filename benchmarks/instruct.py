"""Instruction tuning: packed against padded rows, and against TRL's SFTTrainer on the same rows.

    python benchmarks/instruct.py [--model llama|t5] [--rounds 15] [--cpu-time] [--gpu]
    python benchmarks/instruct.py --packer
    python benchmarks/instruct.py --tokenizing [--rounds 15] [--cpu-time]
    python benchmarks/instruct.py --memory 10000 1000000

One block is an optimiser step over all rows, forward to update: the same useful tokens (all but padding) in
less time. Each variant's first loss, from the same weights, is compared before it is timed. TRL trains no
encoder-decoder, so with t5 the padded batches are the only peer. `--packer` times packing alone, with the
rows of each pack made. `--tokenizing` compares making rows of prompts and of chats (rendering, labels, all)
with the tokenizer's `encode_batch` of the same texts, and chats with transformers' `apply_chat_template` and
its mask of the assistant's tokens, which TRL calls for each row. `--memory` opens a run on so many rows, up
to the first step's packs, and tells the most memory that its process had, how much it has of its own then
(mapped files, which the system takes back at need, left out), and how much of that it holds (what was freed,
and malloc keeps, left out). `--cpu-time` counts the time of one thread, which others on the machine hardly
change. `--gpu` is the same comparison in bf16 with models of 100 to 140
million parameters, 256 rows and packs of 4096 tokens, and tells the most memory that each variant had.
"""

import argparse
import ctypes
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import compare

from ftcore import tiny
from ftcore.compose import compose
from ftcore.job import Job, open_job
from ftcore.loop import run_step
from ftcore.sampling import LengthBuckets
from ftcore.screen import Screen
from ftcore.signals import StopFlag


@dataclass(frozen=True)
class Sizes:
    """Rows and their lengths in tokens, tokens of a pack, rows of a padded batch, the models."""

    rows: int = 32
    typical: float = 4.3  # the mean of the logarithm of the length
    longest: int = 240
    capacity: int = 512
    batch: int = 4
    llama: dict[str, int] = field(
        default_factory=lambda: {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
    )
    t5: dict[str, int] = field(
        default_factory=lambda: {
            "vocab_size": 8192,
            "d_model": 256,
            "d_kv": 64,
            "d_ff": 704,
            "num_layers": 3,
            "num_heads": 4,
        }
    )


CPU = Sizes()
GPU = Sizes(
    rows=256,
    typical=5.5,
    longest=2000,
    capacity=4096,
    batch=8,
    llama={  # SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    t5={  # T5 base, half as deep
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 6,
        "num_heads": 12,
    },
)


def model_and_data(kind: str, sizes: Sizes) -> list[str]:
    """A model with random weights in a directory, and rows of log-normal length, half of each trained."""
    import transformers

    folder = Path(tempfile.mkdtemp(prefix="ftcore-bench-instruct-"))
    torch.manual_seed(0)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(**sizes.llama, tie_word_embeddings=True, pad_token_id=0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config = transformers.T5Config(**sizes.t5, decoder_start_token_id=0, dropout_rate=0.0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny.tokenizer(f"tiny_{kind}").save_pretrained(folder)
    draw, data = random.Random(0), folder / "train.jsonl"
    with data.open("w") as file:
        for _ in range(sizes.rows):
            length = min(sizes.longest, int(draw.lognormvariate(sizes.typical, 0.8)) + 8)
            text = "".join(draw.choice("abcdefgh ") for _ in range(length))
            file.write(json.dumps({"prompt": text[: length // 2], "completion": text[length // 2 :]}) + "\n")
    files = ["data=files", f"data.train={data}", "data.validation=null", "data.test=null"]
    more = [f"data.max_length={sizes.capacity}", "train.log_every=1000000", "optim.warmup=0"]
    more += ["model.dropout=0", f"train.precision={'bf16' if sizes is GPU else 'fp32'}"]
    return ["+plugin=instruct", "model=pretrained", f"model.path={folder}", *files, *more]


def open_at_start(overrides: list[str]) -> Job:
    """A silent job, as it stands before its first step."""
    directory = Path(tempfile.mkdtemp(prefix="ftcore-bench-"))
    return open_job(compose(overrides), directory, lambda shown: Screen(False), StopFlag())


def ours(
    overrides: list[str], pack: bool, sizes: Sizes, clock: Callable[[], float]
) -> tuple[Callable[[], float], float, Job]:
    """A block (a step over all rows, micro-batches of a pack or of some rows), its first loss, the job."""
    more = ["train.batch_size=1000", f"train.micro_batch_size={1 if pack else sizes.batch}"]
    job = open_at_start([*overrides, *more, f"plugin.instruct.pack={str(pack).lower()}"])
    rows = job.prepared.splits["train"]
    sampler: Any = job.hooks.build_sampler(rows, 1000, 0)
    if not pack:
        sampler = LengthBuckets(rows.lengths, 1000, 0, pool=1)
        sampler._order = lambda epoch: [np.random.default_rng(epoch).permutation(len(rows))]
    job.strategy.model.train()

    def block() -> float:
        started = clock()
        job.progress.step = 0
        run_step(job, sampler, 10**6)
        return (clock() - started) * 1000

    job.progress.step = 0
    loss = float(run_step(job, sampler, 10**6)["loss"][0])
    return block, loss, job


def trl(
    overrides: list[str], rows: Any, sizes: Sizes, clock: Callable[[], float]
) -> tuple[Callable[[], float], float]:
    """A block of `SFTTrainer` with packing: one optimiser step over all packs, one pack a micro-batch."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer, pack_dataset

    folder = next(o for o in overrides if o.startswith("model.path=")).partition("=")[2]
    data = datasets.Dataset.from_list(
        [{k: rows[i][k].tolist() for k in ("input_ids", "labels")} for i in range(len(rows))]
    )
    packs = len(pack_dataset(data, sizes.capacity, "bfd"))
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        max_length=sizes.capacity,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=packs,
        max_steps=1,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=sizes is GPU,
        use_cpu=sizes is not GPU,
        report_to=[],
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    marks: list[float] = []

    class Marks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(clock())

    trainer.add_callback(Marks())
    trainer.remove_callback(transformers.PrinterCallback)

    def block() -> float:
        marks.clear()
        trainer.train()
        return (marks[1] - marks[0]) * 1000

    block()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return block, losses[0]


def time_packer(clock: Callable[[], float]) -> None:
    """Rows a second, packs over the lower bound; TRL's on the same rows, where it is installed."""
    from ftcore_instruct._packing import best_fit_decreasing

    lengths = np.random.default_rng(0).lognormal(5, 0.8, 1_000_000).astype(np.int64).clip(4, 2048)
    for count in (20_000, 1_000_000):
        started = clock()
        rows, starts = best_fit_decreasing(lengths[:count], 2048)
        packs = [rows[start:end] for start, end in pairwise(starts.tolist())]
        seconds = clock() - started
        bound = -(-int(lengths[:count].sum()) // 2048)
        print(
            f"ftcore {count:>9} rows  {count / seconds:>11,.0f} rows/s  {len(packs) / bound:.4f} x the bound"
        )
    import datasets
    from trl import pack_dataset

    ids = [np.zeros(n, np.int32) for n in lengths[:20_000]]
    data = datasets.Dataset.from_dict({"input_ids": ids})
    started = clock()
    packs = pack_dataset(data, 2048, "bfd")
    seconds = clock() - started
    bound = -(-int(lengths[:20_000].sum()) // 2048)
    print(f"TRL       20000 rows  {20_000 / seconds:>11,.0f} rows/s  {len(packs) / bound:.4f} x the bound")


MARKED = """\
{% for message in messages %}<s>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}
{% else %}{{ message['content'] }}</s>
{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
"""A template that marks the answers itself, without which `apply_chat_template` gives no mask."""


def time_tokenizing(rounds: int, clock: Callable[[], float]) -> None:
    """Rows of 100 to 900 characters by `Encoder.rows`, against `encode_batch` and `apply_chat_template`."""
    from ftcore_instruct._chat_template import PLAIN
    from ftcore_instruct._formats import Chat
    from ftcore_instruct._rows import Encoder

    draw = random.Random(0)
    tokenizer: Any = tiny.tokenizer("tiny_llama")
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 9))) for _ in range(999)]
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(20, 150))) for _ in range(1000)]
    tokenizer = tokenizer.train_new_from_iterator(texts, 4000)
    tokenizer.chat_template = PLAIN
    place = {"source": 0, "example": 0, "variant": 0, "where": ""}
    tasks = [
        {"prompt": t[: len(t) // 2], "answer": t[len(t) // 2 :], "shots": [], "separator": "", **place}
        for t in texts
    ]
    said = [
        [{"role": "user", "content": x["prompt"]}, {"role": "assistant", "content": x["answer"]}]
        for x in tasks
    ]
    chats = [{"chat": Chat(messages=m), **place} for m in said]
    options: Any = {"seq2seq": False, "max_length": 2048, "train_on": "assistant", "system": None}
    encoder = Encoder(tokenizer, wrap=False, **options)
    rendered = [encoder.renderer.answers(x["chat"])[0] for x in chats]

    def block(work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            started = clock()
            work()
            return (clock() - started) * 1000

        return run

    def raw(many: list[str]) -> Callable[[], Any]:
        return lambda: tokenizer.backend_tokenizer.encode_batch(many, add_special_tokens=False)

    compare(
        {"encode_batch": block(raw(texts)), "prompts": block(lambda: encoder.rows(tasks, False))},
        rounds=rounds,
    )
    compare(
        {"encode_batch": block(raw(rendered)), "chats": block(lambda: encoder.rows(chats, False))},
        rounds=rounds,
    )
    tokenizer.chat_template = MARKED
    encoder = Encoder(tokenizer, wrap=False, **options)

    def peer(messages: Any) -> Any:
        return tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)

    row, theirs = encoder.rows(chats[:1], False)[0][0], peer(said[0])
    assert row["input_ids"].tolist() == theirs["input_ids"]
    assert (row["labels"] != -100).tolist() == [bool(x) for x in theirs["assistant_masks"]]
    compare(
        {
            "apply_chat_template": block(lambda: [peer(m) for m in said]),
            "chats": block(lambda: encoder.rows(chats, False)),
        },
        rounds=rounds,
    )


def own_memory() -> float:
    """MiB of this process that no file backs."""
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def measure_memory(count: int) -> None:
    """In a process of its own: `count` prompts formatted, packed and a step's batch made; its peak memory."""
    import os
    import resource
    import sys

    if (child := os.fork()) == 0:
        folder = Path(tempfile.mkdtemp(prefix="ftcore-bench-instruct-"))
        os.environ["FTCORE_CACHE"] = str(folder / "cache")
        with (folder / "train.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"prompt": f"say {i} " * (1 + i % 4), "completion": f"{i}"}) + "\n")
        files = ["data=files", f"data.train={folder}/train.jsonl", "data.validation=null", "data.test=null"]
        started = time.perf_counter()
        job = open_at_start(["+plugin=instruct", "model=tiny_llama", *files, "train.epochs=1"])
        sampler = job.hooks.build_sampler(job.prepared.splits["train"], 16, 0)
        sampler(0, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        own = own_memory()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        held = own_memory()
        print(
            f"{count:>9} rows  peak {peak:,.0f} MiB, its own {own:,.0f} MiB, of which held {held:,.0f}",
            end="  ",
        )
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("llama", "t5"), default="llama")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, one thread")
    parser.add_argument("--gpu", action="store_true", help="larger, in bf16, on a CUDA device")
    parser.add_argument("--packer", action="store_true", help="packing alone")
    parser.add_argument("--tokenizing", action="store_true", help="making rows alone")
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS", help="peak memory of a run's start")
    options = parser.parse_args()
    for count in options.memory or ():
        measure_memory(count)
    if options.memory:
        return None
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    if options.packer:
        return time_packer(clock)
    if options.tokenizing:
        return time_tokenizing(options.rounds, clock)
    compare_steps(options.model, GPU if options.gpu else CPU, options.rounds, clock)
    return None


def compare_steps(kind: str, sizes: Sizes, rounds: int, clock: Callable[[], float]) -> None:
    """A step over all rows: packed, padded, and TRL's, after their losses were seen to be one."""
    if sizes is GPU:
        clock = synchronized(clock)
    overrides = model_and_data(kind, sizes)
    packed, loss, job = ours(overrides, True, sizes, clock)
    padded, padded_loss, _ = ours(overrides, False, sizes, clock)
    close = 1e-3 if sizes is GPU else 1e-5
    assert abs(loss - padded_loss) < close * loss, (loss, padded_loss)
    variants = {"ftcore padded": padded, "ftcore packed": packed}
    rows = job.prepared.splits["train"]
    if kind == "llama":
        variants["TRL packed"], trl_loss = trl(overrides, rows, sizes, clock)
        assert abs(loss - trl_loss) < close * loss + 5e-5, (loss, trl_loss)  # logged to four digits
    tokens, device = int(rows.lengths.sum()), job.strategy.device
    name = torch.cuda.get_device_name(device) if sizes is GPU else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {job.cfg.train.precision}, {len(rows)} rows,", end=" ")
    print(f"{tokens} useful tokens, loss {loss:.6f}; time of a step, less is better")
    compare(variants, rounds=rounds, unit="ms")
    for variant, run in variants.items() if sizes is GPU else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        print(
            f"{variant:<24}{(torch.cuda.max_memory_allocated() - held) / 2**20:10,.0f} MiB above what is held"
        )


def synchronized(clock: Callable[[], float]) -> Callable[[], float]:
    """The clock, read when the GPU has done what it was given."""

    def read() -> float:
        torch.cuda.synchronize()
        return clock()

    return read


if __name__ == "__main__":
    main()
