"""Random masks without state: a bit is a function of (seed, step, micro-batch, layer, index) alone.

So a mask is never stored or saved: the gradient, a recomputed forward, a resumed run, another rank or a
shard of the weight gets the same bits by asking again. Knows nothing of weights. No random generator is
involved: on a CPU torch's takes several times as long as everything else mixout does.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import torch
from torch import Tensor

__all__ = ["keep", "mask_key"]

CHUNK = 1 << 20  # indices that share a key: part of what a mask is, never to be changed
CPU_BLOCK = 1 << 16  # hashed at a time, to stay in a core's cache


def mask_key(seed: int, step: int, micro_batch: int, layer: str) -> bytes:
    """What identifies one mask; `micro_batch` is -1 for a mask of the whole step."""
    return hashlib.blake2b(repr((seed, step, micro_batch, layer)).encode(), digest_size=16).digest()


def keep(key: bytes, p: float, start: int, stop: int, device: torch.device) -> Tensor:
    """Bits `start` to `stop` of the mask: each False with probability `p`, independently.

    The bits of a range are the same whatever range they are asked for in.
    """
    bits = torch.empty(stop - start, dtype=torch.bool, device=device)
    threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
    block = CPU_BLOCK if device.type == "cpu" else CHUNK
    for number in range(start // block, -(-stop // block)):
        first, last = max(start, number * block), min(stop, (number + 1) * block)
        torch.ge(_hash(key, first, last, device), threshold, out=bits[first - start : last - start])
    return bits


def _hash(key: bytes, start: int, stop: int, device: torch.device) -> Tensor:
    """A signed 32-bit hash of the indices `start` to `stop`, all in one chunk.

    The finalizer of lowbias32, with one half of the chunk's key before its first multiplication and
    the other half before its second. Its last xor-shift is left out: that mixes only low bits.
    """
    number, offset = divmod(start, CHUNK)
    digest = hashlib.blake2b(key + struct.pack("<q", number), digest_size=8).digest()
    before, between = struct.unpack("<ii", digest)
    x = _scattered(device)[offset : offset + stop - start] ^ before
    scratch = torch.empty_like(x)
    _xor_shift(x, 16, scratch).mul_(0x21F0AAAD).bitwise_xor_(between)
    return _xor_shift(x, 15, scratch).mul_(0x735A2D97)


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
