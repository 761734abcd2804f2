"""NEFTune (Jain et al., 2023) as an ftcore plugin: `ftcore +plugin=neftune`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ftcore import Batch, Step, UserError, hookimpl, plugin

__all__ = ["NEFTune", "noise", "row_masks"]


def noise(length: int, width: int, alpha: float, generator: torch.Generator) -> Tensor:
    """alpha / √(L·d) · U(-1, 1) for one row, [length, width], fp32, on the generator's device.

    Its L2 norm is alpha / √3 on average, whatever L and d are (section 2 of the paper).
    """
    drawn = torch.empty(length, width, device=generator.device)
    return drawn.uniform_(-1, 1, generator=generator).mul_(alpha / max(1, length * width) ** 0.5)


def row_masks(batch: Batch) -> list[tuple[int, Tensor]]:
    """For each data-set row of a micro-batch: which tensor row it is in, and where there, [length] bool.

    Padding is nobody's. In a packed batch each row starts where `position_ids` is 0.

    Raises:
        UserError: neither `attention_mask` nor `position_ids` tells where rows are.
    """
    if "attention_mask" in batch:
        return list(enumerate(batch["attention_mask"].bool()))
    if "position_ids" not in batch:
        raise UserError("neftune can't tell rows apart: the batch has no attention_mask and no position_ids")
    flat = (batch["position_ids"] == 0).cumsum(dim=1)[0]
    return [(0, flat == number) for number in range(1, int(flat[-1]) + 1)]


@plugin(api=1)
class NEFTune:
    """Add uniform noise to the embeddings while training (Jain et al., 2023)."""

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be at least 0 and finite, got {self.alpha}")
        self._embeddings: torch.nn.Module | None = None

    @hookimpl
    def setup_model(self, model: Any) -> None:
        inner = model.get_encoder() if model.config.is_encoder_decoder else model
        self._embeddings = inner.get_input_embeddings()

    @hookimpl(wrapper=True)
    def forward(self, batch: Batch, step: Step) -> Generator[None, Any, Any]:
        """Only training forwards come by here: evaluation calls the model itself."""
        if not self.alpha:
            return (yield)
        assert self._embeddings is not None
        calls: list[int] = []

        def add(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            calls.append(1)
            # Where encoder and decoder share the module, the encoder's call comes first.
            return output + self._of(batch, step, output) if len(calls) == 1 else None

        handle = self._embeddings.register_forward_hook(add)
        try:
            outputs = yield
        finally:
            handle.remove()
        if not calls:
            raise UserError("neftune: the model's forward does not call its input embeddings")
        return outputs

    def _of(self, batch: Batch, step: Step, embedded: Tensor) -> Tensor:
        """Noise of a micro-batch, [batch, length, width]: a function of (seed, step, row) alone."""
        total = torch.zeros_like(embedded, dtype=torch.float32)
        masks = row_masks(batch)
        rows: Sequence[int] = batch.rows
        if len(masks) != len(rows):
            raise UserError(f"neftune: {len(rows)} rows are in {len(masks)} sequences, which it can't part")
        for row, (index, mask) in zip(rows, masks, strict=True):
            seed = step.row_generator("neftune", row).initial_seed()
            generator = torch.Generator(embedded.device).manual_seed(seed)
            total[index, mask] = noise(int(mask.sum()), embedded.shape[-1], self.alpha, generator)
        return total.to(embedded.dtype)
