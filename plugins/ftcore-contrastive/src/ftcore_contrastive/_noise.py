"""Noise in the training texts: typing errors, words left out or out of order; other splits stay clean."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Sequence
from typing import Any, Literal

from ftcore import UserError, hookimpl, plugin

__all__ = ["TextNoise", "disturb"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@plugin()
class TextNoise:
    """Disturb the training texts: typos, dropped or swapped words; to see what a loss stands."""

    kind: Literal["typo", "drop", "swap"] = "typo"
    strength: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")

    @hookimpl(wrapper=True)
    def format_examples(
        self, examples: Sequence[dict[str, Any]], cfg: Any, split: str
    ) -> Generator[None, Any, Any]:
        """Change the texts before anyone formats them; what is drawn is a function of the text and `seed`."""
        columns = [name for name in (cfg.data.columns.text, cfg.data.columns.text_pair) if name]
        for example in examples if split == "train" else ():
            for name in columns:
                if isinstance(example.get(name), str):
                    example[name] = disturb(example[name], self.kind, self.strength, self.seed)
        entries = yield  # a column that core needs is missed there
        if not any(name in examples[0] for name in columns):
            raise UserError(
                f"text_noise disturbs data.columns.text, which is '{columns[0]}'; there is no such column"
                f" among {', '.join(examples[0])}"
            )
        return entries


def disturb(text: str, kind: str, strength: float, seed: int = 0) -> str:
    """The text, each word disturbed with a probability of `strength`; always the same for the same text.

    Args:
        kind: `typo`: one letter of the word is left out, doubled, replaced, or changes places with the next;
            `drop`: the word is left out, but one always stays; `swap`: it changes places with the next word.
    """
    digest = hashlib.blake2b(f"{seed}:{kind}:{text}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    words = text.split()
    chosen = [rng.random() < strength for _ in words]
    if not any(chosen):
        return text
    if kind == "typo":
        return " ".join(_typo(word, rng) if hit else word for word, hit in zip(words, chosen, strict=True))
    if kind == "drop":
        kept = [word for word, hit in zip(words, chosen, strict=True) if not hit]
        return " ".join(kept or words[:1])
    for i, hit in enumerate(chosen[:-1]):
        if hit:
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    before, letter, after = word[:at], word[at], word[at + 1 :]
    found = [
        before + after,
        before + letter + letter + after,
        before + rng.choice(LETTERS) + after,
        before + after[:1] + letter + after[1:],
    ]
    return rng.choice([one for one in found if one not in ("", word)])
