"""R3F (Aghajanyan et al., 2020) as an ftcore plugin: `ftcore +plugin=r3f`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor

from ftcore import Batch, LossTerm, Step, UserError, hookimpl, plugin

__all__ = ["R3F", "predicted", "symmetric_kl"]

LEAST = {"bf16": 1e-2, "fp16": 1e-3}
"""Noise below this is lost in the rounding of a precision; measured by all-MiniLM-L6-v2."""


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) of softmaxes, summed over predictions; a scalar, fp32.

    It is Σ (p - q)(log p - log q), in which no two large numbers cancel.

    Args:
        p, q: logits, [predictions, classes].
    """
    log_p, log_q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def predicted(logits: Tensor, labels: Tensor, is_decoder: bool) -> Tensor:
    """The logits that a label is there for, [predictions, classes].

    Args:
        logits: [rows, classes], or [rows, tokens, vocabulary].
        labels: [rows], or [rows, tokens] with -100 where nothing is trained.
        is_decoder: token t's logits are for label t + 1.

    Raises:
        UserError: a regression, or logits that do not go with the labels.
    """
    if logits.ndim == 2 and labels.ndim == 1:
        if logits.shape[1] < 2:
            raise UserError("r3f compares distributions over classes; a regression's one output has none")
        return logits
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"r3f: logits {list(logits.shape)} do not go with labels {list(labels.shape)};"
            " it can be had for a label per row or per token (with instruct: plugin.instruct.loss=full)"
        )
    if is_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


@plugin(api=1, needs=("logits", "row_tensors"))
class R3F:
    """Punish predictions that change when the embeddings get a little noise (Aghajanyan et al., 2020)."""

    weight: float = 1.0
    eps: float = 1e-5
    noise: Literal["uniform", "normal"] = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be at least 0 and finite, got {self.weight}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be above 0 and finite, got {self.eps}")
        self._embeddings: torch.nn.Module | None = None
        self._is_decoder = False

    @hookimpl
    def setup_model(self, model: Any, cfg: Any) -> None:
        precision = cfg.train.precision
        least = LEAST.get(precision, 0.0)
        if self.weight and self.eps < least:
            raise UserError(
                f"plugin.r3f.eps={self.eps:g} is lost in the rounding of train.precision={precision}, and the"
                f" divergence would measure that: train in fp32, or set eps to {least:g} or more"
            )
        has_encoder = model.config.is_encoder_decoder
        inner = model.get_encoder() if has_encoder else model
        self._embeddings, self._is_decoder = inner.get_input_embeddings(), not has_encoder

    @hookimpl(wrapper=True)
    def compute_loss(self, batch: Batch, outputs: Any, step: Step) -> Generator[None, Any, Any]:
        terms = yield
        if self.weight:
            pair = [
                predicted(o.logits, batch["labels"], self._is_decoder)
                for o in self._both(batch, outputs, step)
            ]
            unit = "examples" if batch["labels"].ndim == 1 else "tokens"
            terms["r3f"] = LossTerm(sum=symmetric_kl(*pair), unit=unit, weight=self.weight)
        return terms

    def _both(self, batch: Batch, outputs: Any, step: Step) -> tuple[Any, Any]:
        """The clean outputs, and those of a second forward with noise and the same dropout masks."""
        assert self._embeddings is not None
        calls: list[int] = []

        def add(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            calls.append(1)
            # Where encoder and decoder share the module, the encoder's call comes first.
            return output + self._noise(batch, step, output) if len(calls) == 1 else None

        handle = self._embeddings.register_forward_hook(add)
        try:
            noisy = step.forward(batch)
        finally:
            handle.remove()
        if not calls:
            raise UserError("r3f: the model's forward does not call its input embeddings")
        return outputs, noisy

    def _noise(self, batch: Batch, step: Step, embedded: Tensor) -> Tensor:
        """Noise of a micro-batch, [rows, tokens, width]: by (seed, step, row) alone; padding has none."""
        total = torch.zeros_like(embedded, dtype=torch.float32)
        for index, (row, mask) in enumerate(zip(batch.rows, batch["attention_mask"].bool(), strict=True)):
            seed = step.row_generator("r3f", row).initial_seed()
            generator = torch.Generator(embedded.device).manual_seed(seed)
            drawn = torch.empty(int(mask.sum()), embedded.shape[-1], device=embedded.device)
            if self.noise == "normal":
                total[index, mask] = drawn.normal_(0, self.eps, generator=generator)
            else:
                total[index, mask] = drawn.uniform_(-self.eps, self.eps, generator=generator)
        return total.to(embedded.dtype)
