"""Checksums of a whole from those of its parts, without the bytes.

Given     the values of two neighbouring pieces, and the length of the second one.
Returns   the value of both together, as if they had been read in one go.
Promises  exact for adler32, crc32 and crc32c, for lengths of any size, in some 64 steps a pair.
Partner   replica.storage.chunked hashes chunks in any order, from several sources; grid storages want one adler32.

Why it works. An adler32 is two sums modulo 65521, and appending n bytes adds the first sum n times to the second. A CRC
is the remainder of a polynomial: appending n bytes multiplies what came before by x^(8n), so `_shift` multiplies in
GF(2)[x] modulo the polynomial, by squaring. xxh3, md5 and sha256 have no such rule: a whole needs one pass in order.
"""

from __future__ import annotations

from functools import lru_cache

_ADLER = 65521
#: The polynomials, lowest bit first, as both CRCs are computed.
CRC32 = 0xEDB88320
CRC32C = 0x82F63B78


def adler32_combine(first: int, second: int, second_bytes: int) -> int:
    a1, b1 = first & 0xFFFF, first >> 16
    a2, b2 = second & 0xFFFF, second >> 16
    a = (a1 + a2 - 1) % _ADLER  # each begins with 1
    b = (b1 + b2 + second_bytes * (a1 - 1)) % _ADLER
    return b << 16 | a


def crc32_combine(first: int, second: int, second_bytes: int) -> int:
    return _multiply(_shift(8 * second_bytes, CRC32), first, CRC32) ^ second


def crc32c_combine(first: int, second: int, second_bytes: int) -> int:
    return _multiply(_shift(8 * second_bytes, CRC32C), first, CRC32C) ^ second


def _multiply(a: int, b: int, polynomial: int) -> int:
    """a·b modulo the polynomial; the highest bit is x^0."""
    product = 0
    bit = 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = b >> 1 ^ polynomial if b & 1 else b >> 1
    return product


@lru_cache(maxsize=1024)
def _shift(bits: int, polynomial: int) -> int:
    """x^bits modulo the polynomial. Kept: a file's chunks are of one length, but for the last."""
    power, square = 1 << 31, 1 << 30  # x^0 and x^1
    while bits:
        if bits & 1:
            power = _multiply(square, power, polynomial)
        square = _multiply(square, square, polynomial)
        bits >>= 1
    return power
