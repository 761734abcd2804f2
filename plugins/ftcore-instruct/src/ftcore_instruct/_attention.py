"""Attention of packed rows: each row sees itself alone, with no mask over the whole pack.

A packed batch is one flat row of tokens. transformers would keep its rows apart by a dense mask of
tokens x tokens; here attention runs row by row (varlen flash attention on a GPU in half precision), so that
what lies between rows costs nothing. `packed_inputs` makes the model's arguments, `use_segments` puts the
attention in place, `check_packing` proves for the model in hand that it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftcore import Batch, UserError

__all__ = [
    "Lengths",
    "Segments",
    "check_flash",
    "check_packing",
    "packed_inputs",
    "segment_attention",
    "use_segments",
]

NAME = "ftcore_segments"
TOLERANCE = 1e-4  # of logits, relative to the largest one
HALF_TOLERANCE = 5e-2  # of attention in half precision and its gradient, the same


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of a pack, and where the rows begin and end: int32 [rows + 1], on the device."""

    sizes: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Lengths:
        bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
        return cls(tuple(sizes), bounds)

    @property
    def longest(self) -> int:
        return max(self.sizes)


@dataclass(frozen=True)
class Segments:
    """The rows of a pack: `source` of a decoder alone or an encoder, `target` of a decoder beside one."""

    source: Lengths
    target: Lengths | None = None

    def of(self, module: Any) -> tuple[Lengths, Lengths]:
        """Lengths of the queries and of the keys of an attention module."""
        if self.target is None or not getattr(module, "is_decoder", False):
            return self.source, self.source
        return self.target, self.target if module.is_causal else self.source


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each row of a pack, by transformers' attention interface.

    Args:
        query: [1, heads, queries, dim]; key and value [1, key heads, keys, dim].
        segments: what is packed; None is an ordinary call (evaluation), which `sdpa` answers.
        position_bias: [1, heads, n, n] for distances below n, the longest row; cross-attention has none.
        sliding_window: a token sees itself and so many less one before it.

    Returns:
        [1, queries, heads, dim], and no weights.
    """
    if segments is None:
        more = {} if position_bias is None else {"position_bias": position_bias}
        return _ordinary(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention with a soft-cap or sinks")
    queries, keys = segments.of(module)
    causal = bool(getattr(module, "is_causal", True))
    if queries is not keys:
        position_bias = None  # of cross-attention: zeros
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    in_half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if in_half and position_bias is None and not dropout:
        out = _flash(query, key, value, queries, keys, causal, scaling, sliding_window)
        return out.unsqueeze(0), None
    corners = _corners(position_bias, keys.sizes, query.dtype)
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_mask(q.shape[2], k.shape[2], causal, corners.get(k.shape[2]), sliding_window, q),
            dropout_p=dropout,
            is_causal=causal and position_bias is None and not _cuts(sliding_window, k.shape[2]),
            scale=scaling,
        )
        for q, k, v in zip(
            torch.split(query, list(queries.sizes), dim=2),
            torch.split(key, list(keys.sizes), dim=2),
            torch.split(value, list(keys.sizes), dim=2),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _ordinary(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    answer: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](*inputs, **options)
    return answer


def _cuts(sliding_window: int | None, length: int) -> bool:
    return sliding_window is not None and length > sliding_window


def _corners(bias: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> dict[int, Tensor]:
    """The bias of a row, by its length.

    Each is cut from the next larger one: the gradient of a slice has the size of what it was cut from.
    """
    corners: dict[int, Tensor] = {}
    if bias is not None:
        bias = bias.to(dtype)
        for n in sorted(set(sizes), reverse=True):
            corners[n] = bias = bias[:, :, :n, :n]
    return corners


def _mask(
    queries: int, keys: int, causal: bool, bias: Tensor | None, window: int | None, like: Tensor
) -> Tensor | None:
    """What `is_causal` of one row can't say: a bias by distance, or a window."""
    if bias is None and not _cuts(window, keys):
        return None
    mask = None
    if causal:
        distance = torch.arange(queries, device=like.device)[:, None] - torch.arange(keys, device=like.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if bias is None:
        return mask
    return bias if mask is None else bias.masked_fill(~mask, torch.finfo(like.dtype).min)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Lengths,
    keys: Lengths,
    causal: bool,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's varlen flash attention: [tokens, heads, dim]."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        queries.bounds,
        keys.bounds,
        queries.longest,
        keys.longest,
        scale=scaling,
        window_size=(left, 0) if causal else (-1, -1),
    )
    assert isinstance(out, Tensor)
    return out


def packed_inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """The model's arguments for a flat batch of `_packing.flatten`.

    The mask is a stand-in of one element: where one of four dimensions is given, transformers makes none.
    """
    ids = batch["input_ids"]
    nothing = torch.zeros(1, 1, 1, 1, device=ids.device)
    source = Lengths.of(batch.columns["length"], ids.device)
    if not config.is_encoder_decoder:
        return {
            "input_ids": ids,
            "position_ids": batch["position_ids"],
            "attention_mask": nothing,
            "segments": Segments(source),
            "use_cache": False,
        }
    target = Lengths.of(batch.columns["target_length"], ids.device)
    return {
        "input_ids": ids,
        "attention_mask": nothing,
        "decoder_input_ids": _shift_right(batch["labels"], target, config),
        "decoder_attention_mask": nothing,
        "segments": Segments(source, target),
        "use_cache": False,
    }


def _shift_right(labels: Tensor, target: Lengths, config: Any) -> Tensor:
    """What the decoder reads: each row's labels one later, after the start token; [1, tokens]."""
    shifted = labels.roll(1, dims=1)
    shifted[0, target.bounds[:-1].long()] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def use_segments(model: Any) -> None:
    """Make the model attend by `segment_attention`; without `segments` it computes what it did before.

    Raises:
        UserError: a model whose attention can't be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if before in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise _refuse(model, f"its attention is '{before}', which can't be replaced")
    for module in _with_relative_bias(model):
        _shorten_bias(module)


def _with_relative_bias(model: Any) -> Iterator[Any]:
    """T5's first attention layers, which compute the bias by distance for all layers."""
    return (m for m in model.modules() if getattr(m, "has_relative_attention_bias", False))


def _shorten_bias(module: Any) -> None:
    """Compute the bias for the longest row alone: distances between rows are never looked up."""
    whole: Callable[..., Tensor] = module.compute_bias

    def compute_bias(query_length: int, key_length: int, **kwargs: Any) -> Tensor:
        longest = module.packed_longest or key_length
        return whole(min(query_length, longest), min(key_length, longest), **kwargs)

    module.packed_longest = None
    module.compute_bias = compute_bias


def set_longest(model: Any, segments: Segments | None) -> None:
    """Tell T5's bias what comes; kept until the next forward, as checkpointing computes it again."""
    for module in _with_relative_bias(model):
        module.packed_longest = segments and segments.of(module)[0].longest


def check_packing(model: Any, flat: Callable[[list[Any]], Batch]) -> None:
    """Compare the logits of three packed rows with those of each row by itself, on this very model.

    Args:
        flat: how rows become a flat batch.

    Raises:
        UserError: the model refuses or mixes packed rows (state-space layers, absolute positions that
            can't start anew, other attention), with what was found.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    rows, at = [], 0
    for size in (5, 3, 7):
        ids = torch.arange(at, at + size) % (model.config.get_text_config().vocab_size - 1) + 1
        answer = ids.flip(0)[: 2 + size // 2] if model.config.is_encoder_decoder else ids
        rows.append({"input_ids": ids.numpy(), "labels": answer.numpy()})
        at += size
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = _logits(model, flat(rows))
            alone = torch.cat([_logits(model, flat([row])) for row in rows], dim=1)
            plain = torch.cat([_plain_logits(model, row) for row in rows], dim=1)
    except UserError:
        raise
    except Exception as error:
        raise _refuse(model, str(error).partition("\n")[0]) from error
    finally:
        model.train(training)
        set_longest(model, None)
    off = max(float((x - plain).abs().max() / plain.abs().max()) for x in (together, alone))
    if not off < TOLERANCE:
        raise _refuse(model, f"logits of packed rows are off by {off:.1e}: rows see each other")


def check_flash(
    device: torch.device, dtype: torch.dtype, *, window: int | None = None, cross: bool = False
) -> None:
    """Compare varlen flash attention in `dtype` with the loop in fp32, outputs and gradients, on this device.

    Args:
        window: as `sliding_window` of `segment_attention`.
        cross: of a decoder's rows to those of an encoder, which have other lengths; else causal, in one row.

    Raises:
        UserError: they differ by more than rounding, with the largest difference.
    """
    sizes = (65, 3, 130)
    asking = (20, 7, 90) if cross else sizes
    module: Any = torch.nn.Module()
    module.is_decoder, module.is_causal = cross, not cross
    drawn = torch.Generator().manual_seed(0)
    shapes = [(1, 4, sum(asking), 64), *[(1, 2, sum(sizes), 64)] * 2]
    drawings = [torch.randn(shape, generator=drawn).to(device) for shape in shapes]
    segments = Segments(Lengths.of(sizes, device), Lengths.of(asking, device) if cross else None)
    results = []
    for kind in (torch.float32, dtype):
        query, key, value = inputs = [x.to(kind, copy=True).requires_grad_(True) for x in drawings]
        out, _ = segment_attention(
            module, query, key, value, None, segments=segments, scaling=0.125, sliding_window=window
        )
        found = torch.autograd.grad(out.float().square().sum(), inputs)
        results.append([x.detach().float() for x in (out, *found)])
    off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))
    if not off < HALF_TOLERANCE:
        raise UserError(
            f"flash attention of packed rows is off by {off:.1e} in {dtype} on {device} (torch"
            f" {torch.__version__}); set plugin.instruct.pack=false, or train.precision=fp32"
        )


def _logits(model: Any, batch: Batch) -> Tensor:
    inputs = packed_inputs(batch, model.config)
    set_longest(model, inputs["segments"])
    logits: Tensor = model(**inputs).logits
    return logits


def _plain_logits(model: Any, row: dict[str, Any]) -> Tensor:
    """Of one row, without any of this module."""
    set_longest(model, None)
    inputs = {"input_ids": torch.as_tensor(row["input_ids"])[None], "use_cache": False}
    if model.config.is_encoder_decoder:
        labels = torch.as_tensor(row["labels"])[None]
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits: Tensor = model(**inputs).logits
    return logits


def _refuse(model: Any, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} can't train on packed rows ({reason}); set plugin.instruct.pack=false"
    )
