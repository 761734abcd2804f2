"""Random masks without state: an element is a function of (seed, step, micro-batch, layer, index) alone.

So a mask is never stored or saved: the gradient, a recomputed forward, a resumed run, another rank or a
shard of the weight gets the same mask by asking again. Knows nothing of weights. No random generator is
involved: on a CPU torch's takes several times as long as everything else mixout does.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import torch
from torch import Tensor

__all__ = ["draw", "mask_key"]

CHUNK = 1 << 20
"""Indices that share a key and are hashed at a time: part of what a mask is, never to be changed."""


def mask_key(seed: int, step: int, micro_batch: int, layer: str) -> bytes:
    """What identifies one mask; `micro_batch` is -1 for a mask of the whole step."""
    return hashlib.blake2b(repr((seed, step, micro_batch, layer)).encode(), digest_size=16).digest()


def draw(key: bytes, p: float, start: int, stop: int, device: torch.device) -> Tensor:
    """Elements `start` to `stop` of a mask over its mean, fp32: 0 with probability `p`, else 1 / (1 - p).

    They are the same whatever range they are asked for in.
    """
    drawn = torch.empty(stop - start, dtype=torch.float32, device=device)
    words = drawn.view(torch.int32)
    last_dropped = round(p * 2**31) - 2**30 - 1  # of a hash of 31 bits, signed
    (kept,) = struct.unpack("<i", struct.pack("<f", 1 / (1 - p)))
    for number in range(start // CHUNK, -(-stop // CHUNK)):
        first, last = max(start, number * CHUNK), min(stop, (number + 1) * CHUNK)
        x = words[first - start : last - start]
        _hash(key, first, out=x)
        # All ones where kept, all zeros where not, and the bits of 1 / (1 - p): three times as
        # fast as a comparison, whose result is a tensor of another type.
        torch.sub(last_dropped, x.bitwise_right_shift_(1), out=x)
        x.bitwise_right_shift_(31).bitwise_and_(kept)
    return drawn


def _hash(key: bytes, start: int, out: Tensor) -> None:
    """Signed 32-bit hashes of the indices from `start`, all in one chunk, into `out`.

    The finalizer of lowbias32, with one half of the chunk's key before its first multiplication and
    the other half before its second. Its last xor-shift is left out: that mixes only low bits.
    """
    number, offset = divmod(start, CHUNK)
    digest = hashlib.blake2b(key + struct.pack("<q", number), digest_size=8).digest()
    before, between = struct.unpack("<ii", digest)
    torch.bitwise_xor(_scattered(out.device)[offset : offset + len(out)], before, out=out)
    scratch = torch.empty_like(out)
    _xor_shift(out, 16, scratch).mul_(0x21F0AAAD).bitwise_xor_(between)
    _xor_shift(out, 15, scratch).mul_(0x735A2D97)


def _xor_shift(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """`x ^= x >> bits`, with zeros shifted in, in place."""
    torch.bitwise_right_shift(x, bits, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))  # an int32 shifts its sign in


@functools.cache
def _scattered(device: torch.device) -> Tensor:
    """The indices of a chunk, hashed: what two chunks hash then has no common order."""
    x = torch.arange(CHUNK, dtype=torch.int32, device=device)
    scratch = torch.empty_like(x)
    _xor_shift(x, 16, scratch).mul_(0x21F0AAAD)
    _xor_shift(x, 15, scratch).mul_(0x735A2D97)
    return _xor_shift(x, 15, scratch)
