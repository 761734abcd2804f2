"""Packed rows: the same logits and gradients as each row by itself, whatever its neighbours are."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ftcore import UserError
from ftcore.collate import pad
from ftcore.tiny import config
from ftcore_instruct import _attention
from ftcore_instruct._attention import (
    Lengths,
    Segments,
    check_flash,
    check_packing,
    segment_attention,
    use_segments,
)
from ftcore_instruct._forward import call, loss_term
from ftcore_instruct._loss import kept_positions
from ftcore_instruct._packing import flatten, padded

SMALL: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: config("tiny_llama"),
    "t5": lambda: config("tiny_t5"),
    "grouped-query": lambda: transformers.LlamaConfig(**SMALL),
    "sliding-window": lambda: transformers.MistralConfig(sliding_window=4, **SMALL),
    "mixed-windows": lambda: transformers.Gemma3TextConfig(sliding_window=4, head_dim=8, **SMALL),
    "learned-positions": lambda: transformers.GPT2Config(
        vocab_size=261, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def build(name: str, **changes: Any) -> Any:
    """A model with random weights, large enough that attention matters, and no dropout."""
    made = MODELS[name]() if name in MODELS else changes.pop("config")
    for key in ("dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(made, key):
            setattr(made, key, 0.0)
    torch.manual_seed(0)
    auto = "AutoModelForSeq2SeqLM" if made.is_encoder_decoder else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(made)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.mul_(3)
    return model


def rows(model: Any, sizes: tuple[int, ...] = (9, 2, 14, 5)) -> list[dict[str, Any]]:
    """Rows of random tokens; a decoder's first third is masked."""
    rng = np.random.default_rng(1)
    made = []
    for size in sizes:
        ids = rng.integers(5, 261, size)
        labels = rng.integers(5, 261, 1 + size // 2)
        if not model.config.is_encoder_decoder:
            labels = np.where(np.arange(size) < 1 + size // 3, -100, ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


def alone(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one row by transformers alone, and its summed loss."""
    ids, labels = (torch.as_tensor(row[key])[None] for key in ("input_ids", "labels"))
    if model.config.is_encoder_decoder:
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(input_ids=ids, decoder_input_ids=shifted).logits
        return logits, F.cross_entropy(logits[0], labels[0], reduction="sum")
    logits = model(input_ids=ids).logits
    return logits, F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked(name: str, checkpointing: bool) -> None:
    """Logits and gradients of four packed rows are those of the rows one by one, to 1e-5."""
    plain = build(name).train()
    model = copy.deepcopy(plain)
    decoder = not model.config.is_encoder_decoder
    use_segments(model)
    check_packing(model, lambda made: flatten(made, decoder))
    if checkpointing:
        name = "activation_checkpointing_enable"  # from transformers 5.24 on
        enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    data = rows(model)
    answers = [alone(plain, row) for row in data]
    torch.stack([loss for _, loss in answers]).sum().backward()
    batch = flatten(data, decoder)
    logits = call(model, batch, keep=False).logits
    term = loss_term(model, batch, call(model, batch, keep=True), 0.0)
    term.sum.backward()
    theirs = torch.cat([x for x, _ in answers], dim=1)
    assert (logits - theirs).abs().max() < 1e-5 * theirs.abs().max()
    torch.testing.assert_close(term.sum, torch.stack([loss for _, loss in answers]).sum())
    for (key, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, key
        assert other.grad is not None, key
        off = float((mine.grad - other.grad).abs().max())
        assert off < 1e-5 * float(other.grad.abs().max()) + 1e-9, key


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_are_not_seen(name: str) -> None:
    """Other tokens in one packed row leave the logits of all others as they are, bit for bit."""
    model = build(name).eval()
    decoder = not model.config.is_encoder_decoder
    use_segments(model)
    before, after = rows(model), rows(model)
    for key in ("input_ids", "labels"):
        after[2][key] = np.where(after[2][key] == -100, -100, (after[2][key] + 17) % 250 + 5)
    with torch.no_grad():
        was, now = (call(model, flatten(r, decoder), keep=False).logits[0] for r in (before, after))
    sizes = [len(r["labels"]) for r in before]
    for i, (a, b) in enumerate(zip(was.split(sizes), now.split(sizes), strict=True)):
        assert torch.equal(a, b) == (i != 2)


@pytest.mark.parametrize("name", ["llama", "t5", "sliding-window"])
def test_ordinary_calls_compute_what_they_did(name: str) -> None:
    """Padded batches, before and after the attention was replaced, also after a packed call."""
    model = build(name).eval()
    decoder = not model.config.is_encoder_decoder
    data = rows(model)
    batch = padded(data, decoder, 0)
    if decoder:  # as generation pads
        batch = pad([{k: row[k] for k in ("input_ids", "labels")} for row in data], 0, "left")
        batch["kept"] = kept_positions(batch["labels"])
    with torch.no_grad():
        before = call(model, batch, keep=False).logits
        use_segments(model)
        call(model, flatten(data, decoder), keep=False)
        after = call(model, batch, keep=False).logits
    assert torch.equal(before, after)


REFUSED = {
    "absolute positions": transformers.BartConfig(
        vocab_size=261,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    ),
    "a state": transformers.MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2),
    "alibi": transformers.BloomConfig(vocab_size=261, hidden_size=32, n_layer=2, n_head=2),
    "soft-cap": transformers.Gemma2Config(head_dim=8, **SMALL),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_mix_rows_are_refused(what: str) -> None:
    """The reason, and the key that turns packing off."""
    model = build("", config=REFUSED[what])

    def prove() -> None:
        use_segments(model)
        check_packing(model, lambda made: flatten(made, not model.config.is_encoder_decoder))

    with pytest.raises(UserError, match=r"can't train on packed rows \(.+\); set plugin.instruct.pack=false"):
        prove()


def test_a_model_that_sees_across_rows_is_caught() -> None:
    """The proof fails where attention ignores the rows' bounds."""
    model = build("llama")
    use_segments(model)
    forward = model.forward

    def leaky(**inputs: Any) -> Any:
        inputs.pop("segments", None)
        inputs.pop("attention_mask", None)
        inputs.pop("position_ids", None)
        return forward(**inputs)

    model.forward = leaky
    with pytest.raises(UserError, match="rows see each other"):
        check_packing(model, lambda made: flatten(made, True))


KINDS: list[dict[str, Any]] = [{}, {"window": 64}, {"cross": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_allowed(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    """What a GPU's flash attention is held to is met by the loop itself in half precision."""
    check_flash(torch.device("cpu"), dtype, **kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["sees its neighbour", "another scale", "gradient is lost"])
def test_flash_attention_that_is_wrong_is_caught(
    fault: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if query.dtype == torch.bfloat16 and fault == "sees its neighbour":
            joined = [  # the first two as one
                Lengths.of((x.sizes[0] + x.sizes[1], x.sizes[2]), query.device)
                for x in (options["segments"].source, options["segments"].target)
                if x is not None
            ]
            options["segments"] = Segments(*joined)
        if query.dtype == torch.bfloat16 and fault == "another scale":
            options["scaling"] = 0.25
        if query.dtype == torch.bfloat16 and fault == "gradient is lost":
            value = torch.cat([value[:, :, :65], value[:, :, 65:].detach()], dim=2)
        return segment_attention(module, query, key, value, mask, **options)

    monkeypatch.setattr(_attention, "segment_attention", wrong)
    with pytest.raises(
        UserError, match=r"off by \S+ in torch.bfloat16 on cpu .*plugin\.instruct\.pack=false"
    ):
        check_flash(torch.device("cpu"), torch.bfloat16, **kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
def test_flash_equals_the_loop(window: int | None) -> None:
    """Varlen flash attention in bf16 against the loop in fp32, output and gradient."""
    module = torch.nn.Module()
    module.is_causal = True
    sizes = (100, 3, 257)
    query, key, value = (torch.randn(1, h, sum(sizes), 64, device="cuda") for h in (4, 2, 2))
    segments = Segments(Lengths.of(sizes, query.device))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_(True) for x in (query, key, value)]
        out, _ = segment_attention(
            module, *inputs, None, segments=segments, scaling=0.125, sliding_window=window
        )
        out.float().square().sum().backward()
        results.append([out.float(), *(x.grad.float() for x in inputs)])
    for loop, flash in zip(*results, strict=True):
        torch.testing.assert_close(flash, loop, rtol=3e-2, atol=3e-2 * float(loop.abs().max()))
