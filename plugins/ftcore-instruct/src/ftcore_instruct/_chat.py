"""`ftcore chat RUN_DIR`: talk to the model of a run in the terminal. Answers appear as they are made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftcore import UserError
from ftcore.commands import Parser

__all__ = ["main"]

HELP = "/reset forgets what was said, /quit (or the end of the input) leaves"


def main(arguments: Sequence[str]) -> int:
    """Answer each line of the standard input, until its end."""
    options = _parser().parse_args(arguments)
    model, tokenizer = load(options.run_dir, options.device)
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    shown = sys.stdin.isatty()
    if shown:
        print(f"{options.run_dir}: {HELP}")
    for line in _lines("> " if shown else ""):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        text = answer(model, tokenizer, messages, options.max_new_tokens, options.temperature, options.seed)
        messages.append({"role": "assistant", "content": text})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ftcore chat", description=f"Talk to the model of a run, one line at a time; {HELP}."
    )
    parser.add_argument("run_dir", type=Path, help="its directory (runs/latest is the newest)")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of what a temperature draws")
    parser.add_argument("--device", help="cuda, mps or cpu; the first there is")
    return parser


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, without empty lines."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def load(run_dir: Path, device: str | None) -> tuple[Any, Any]:
    """The model that a finished run exported, ready to generate, and its tokenizer.

    Raises:
        UserError: no finished run there, or one whose model does not write text.
    """
    folder = run_dir / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"{run_dir} has no model/: no run has finished there")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    name = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    if type(config) not in getattr(transformers, name)._model_mapping:
        raise UserError(f"{folder} holds a {config.model_type} model, which does not write text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(f"{folder} has no chat template; train it by +plugin=instruct")
    model = getattr(transformers, name).from_pretrained(folder)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def answer(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Print the model's answer to a conversation while it is made; returns it."""
    import torch
    from transformers import TextStreamer

    is_encoder_decoder = model.config.is_encoder_decoder
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    # As in training: what an encoder reads has its end token.
    inputs = tokenizer(prompt, add_special_tokens=is_encoder_decoder, return_tensors="pt").to(model.device)
    torch.manual_seed(seed + len(messages))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    made = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(tokenizer),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )[0]
    text: str = tokenizer.decode(
        made if is_encoder_decoder else made[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text.strip()


def _ends(tokenizer: Any) -> list[int]:
    """What ends an answer: the end token, and the special token that the template closes a turn with."""
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
    ids = ids[0] if ids and isinstance(ids[0], list) else ids
    special = [i for i in ids[-2:] if i in tokenizer.all_special_ids]
    return sorted({tokenizer.eos_token_id, *special} - {None})
