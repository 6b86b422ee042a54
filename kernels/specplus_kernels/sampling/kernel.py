"""Triton halves of noise.py, and the softmax pieces that the verification kernels share.

Logits are cleaned as they are read: NaN counts as -inf, +inf as the largest float.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specplus_kernels.sampling import noise

ACCEPT = tl.constexpr(noise.ACCEPT)
LARGEST = tl.constexpr(3.4028234663852886e38)
MAX_GUMBEL = tl.constexpr(23.0)  # u >= 2^-33, so the noise is at most 33 log 2 = 22.9

# Blocks of a row that one program reads in turn, and programs per launch. Chosen by arithmetic: 4
# warps x 32 lanes x 16 elements keep 4 (bf16) or 8 (fp32) 16-byte loads of a thread in flight, and
# 1,024 programs fill 132 SMs about twice at 4 such programs each.
BLOCK = 2048
NUM_WARPS = 4
MIN_PROGRAMS = 1024
MAX_SPLITS = 32


def num_splits(num_rows: int, vocab_size: int) -> int:
    """Programs that share one row, a power of two fixed by the shapes."""
    wanted = min(MIN_PROGRAMS // max(num_rows, 1), MAX_SPLITS, triton.cdiv(vocab_size, BLOCK))
    return 1 << (max(wanted, 1).bit_length() - 1)


def split_size(vocab_size: int, splits: int) -> int:
    """Tokens of a row that one program reads, whole blocks."""
    return triton.cdiv(triton.cdiv(vocab_size, BLOCK), splits) * BLOCK


@triton.jit
def rotate(word, BY: tl.constexpr):
    """Rotates 32 bits to the left."""
    return (word << BY) | (word >> (32 - BY))


@triton.jit
def absorb(state, word):
    """One round of MurmurHash3."""
    word = rotate(word * 0xCC9E2D51, 15) * 0x1B873593
    return rotate(state ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def hash_prefix(seed, position, DOMAIN: tl.constexpr):
    """The part of the hash that all tokens of a row share; seed and position are int64."""
    state = (seed ^ seed).to(tl.uint32) ^ DOMAIN
    state = absorb(state, (seed & 0xFFFFFFFF).to(tl.uint32))
    state = absorb(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return absorb(state, (position & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def hash_finish(prefix, token):
    """The hash of a token, from the prefix of its row."""
    state = absorb(prefix, token.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def coin(seed, position, row):
    """noise.coin."""
    bits = hash_finish(hash_prefix(seed, position, ACCEPT), row)
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def gumbel(prefix, token):
    """noise.gumbel, operation by operation, for the row whose hash prefix is given."""
    bits = hash_finish(prefix, token)
    high = (bits >> 16).to(tl.int32).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 7.0 + u * (1.0 / 8.0)
    series = 1.0 / 6.0 + u * series
    series = 1.0 / 5.0 + u * series
    series = 1.0 / 4.0 + u * series
    series = 1.0 / 3.0 + u * series
    series = 1.0 / 2.0 + u * series
    series = 1.0 + u * series
    direct = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(-tl.where(u < 0.25, -u * series, direct))


@triton.jit
def clean(logits):
    """NaN to -inf, +inf to the largest float."""
    logits = tl.where(logits == logits, logits, float("-inf"))
    return tl.minimum(logits, LARGEST)


@triton.jit
def noised_argmax(best, best_token, scores, tokens, prefix, temperature):
    """The better of (best, best_token) and a block of scores, with noise unless temperature is 0.

    A block whose largest score cannot win even with the largest noise costs one maximum: most
    blocks of a peaked or filtered row draw no noise at all. The first of equals wins.
    """
    headroom = tl.where(temperature == 0.0, 0.0, MAX_GUMBEL)
    if tl.max(scores, 0) + headroom > best:
        if temperature != 0.0:
            scores += gumbel(prefix, tokens)
        top, index = tl.max(scores, 0, return_indices=True)
        if top > best:
            best = top
            best_token = tl.min(tokens, 0) + index
    return best, best_token
