"""What stands for a row: one vector from the hidden states that the classification head works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftcore import UserError

__all__ = ["hidden_states", "is_decoder_only", "output_projection", "pool", "resolve"]


def resolve(representation: str, config: Any) -> str:
    """`auto` made definite: the first token of an encoder, the last token of a model that decodes.

    Raises:
        UserError: `first_token` of a decoder, which has seen nothing of the text.
    """
    causal = is_decoder_only(config)
    if representation == "auto":
        return "last_token" if causal or config.is_encoder_decoder else "first_token"
    if representation == "first_token" and causal:
        raise UserError(
            f"plugin.contrastive.representation=first_token: a decoder ({config.model_type}) has not seen"
            " the text at its first token; use last_token or mean"
        )
    return representation


def is_decoder_only(config: Any) -> bool:
    """Whether tokens see only what is before them: a causal language model that is not also a masked one."""
    from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder:
        return False
    causal, masked = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind = config.model_type
    return bool(getattr(config, "is_decoder", False)) or (kind in causal and kind not in masked)


def output_projection(model: torch.nn.Module) -> torch.nn.Module:
    """The head's last linear layer; what it reads is what `pooled` means.

    Raises:
        UserError: there is none to be found.
    """
    config: Any = model.config
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == config.num_labels
        and not name.startswith(prefix)
    ]
    if not linear:
        raise UserError(
            f"plugin.contrastive.representation=pooled: {type(model).__name__} has no linear head with"
            f" {config.num_labels} outputs; use first_token, mean or last_token"
        )
    return linear[-1]


def hidden_states(outputs: Any, layer: int) -> Tensor:
    """States of a layer, [rows, tokens, width]; of two stacks the decoder's, which the head reads.

    Raises:
        UserError: the forward kept no hidden states, or has no such layer.
    """
    states = getattr(outputs, "decoder_hidden_states", None) or getattr(outputs, "hidden_states", None)
    if not states:
        raise UserError(
            "contrastive: the model's outputs have no hidden_states; a plugin that replaces `forward`"
            " must pass batch.arguments on to the model"
        )
    if not -len(states) <= layer < len(states):
        raise UserError(
            f"plugin.contrastive.layer must be in [{-len(states)}, {len(states) - 1}]"
            f" (0 is the embeddings, -1 the last layer), got {layer}"
        )
    found: Tensor = states[layer]
    return found


def pool(states: Tensor, mask: Tensor | None, representation: str) -> Tensor:
    """One vector a row: [rows, tokens, width] to [rows, width].

    Args:
        mask: 1 for tokens, 0 for padding on either side, [rows, tokens]; None where nothing is padding.
        representation: `first_token`, `last_token` or `mean`, padding left out.
    """
    if mask is None:
        mask = states.new_ones(states.shape[:2], dtype=torch.int64)
    if mask.shape != states.shape[:2]:
        raise UserError(
            f"contrastive: hidden states of {states.shape[1]} tokens do not match the attention mask of"
            f" {mask.shape[1]}; use representation=pooled"
        )
    if representation == "mean":
        wide = states if states.dtype == torch.float64 else states.float()
        weight = mask.to(wide.dtype)[..., None]
        return (wide * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    place = torch.arange(mask.shape[1], device=mask.device)
    at = (place * mask).argmax(dim=1) if representation == "last_token" else mask.argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), at]
