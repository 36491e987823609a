"""Combined checksums are those of the bytes read in one go."""

from __future__ import annotations

import zlib
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.storage.combine import CRC32, CRC32C, adler32_combine, crc32_combine, crc32c_combine


def crc(content: bytes, polynomial: int) -> int:
    """Bit by bit, as the definition says."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ polynomial if value & 1 else value >> 1
    return value ^ 0xFFFFFFFF


WAYS = {
    "adler32": (zlib.adler32, adler32_combine),
    "crc32": (zlib.crc32, crc32_combine),
    "crc32c": (lambda content: crc(content, CRC32C), crc32c_combine),
}


def test_the_bitwise_crc_is_the_one_the_world_means():
    assert crc(b"123456789", CRC32) == zlib.crc32(b"123456789") == 0xCBF43926
    assert crc(b"123456789", CRC32C) == 0xE3069283


@pytest.mark.parametrize("algorithm", WAYS)
@given(pieces=st.lists(st.binary(max_size=300), min_size=1, max_size=6))
def test_pieces_of_any_length_combine(algorithm, pieces):
    of, combine = WAYS[algorithm]
    combined = of(pieces[0])
    for piece in pieces[1:]:
        combined = combine(combined, of(piece), len(piece))
    assert combined == of(b"".join(pieces))


@pytest.mark.parametrize("algorithm", ["adler32", "crc32"])
@given(length=st.integers(0, 1 << 17), byte=st.sampled_from([0, 1, 255]), chunk=st.integers(1, 70_000))
def test_long_runs_of_one_byte_combine(algorithm, length, byte, chunk):
    """Where the sums wrap round."""
    of, combine = WAYS[algorithm]
    content = bytes([byte]) * length
    pieces = [content[begin : begin + chunk] for begin in range(0, length, chunk)] or [b""]
    pieces = [*pieces[:40], b"".join(pieces[40:])]
    assert reduce(lambda known, p: combine(known, of(p), len(p)), pieces, of(b"")) == of(content)


def test_combining_is_associative_for_lengths_no_memory_holds():
    one, two, three = 0x12345678, 0x9ABCDEF0, 0x0BADCAFE
    for combine in (crc32_combine, crc32c_combine):
        left = combine(combine(one, two, 1 << 50), three, (1 << 60) + 7)
        assert left == combine(one, combine(two, three, (1 << 60) + 7), (1 << 50) + (1 << 60) + 7)
