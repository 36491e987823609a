import hashlib
import zlib

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from replica.storage import hashing
from replica.storage.hashing import Hasher, extra_for
from rules.checksums import Checksums
from rules.errors import Invalid


def of(content: bytes, *algorithms: str) -> dict[str, str]:
    hasher = Hasher(algorithms)
    hasher.update(content)
    return hasher.checksums().as_dict()


def test_known_values():
    assert of(b"") == {"xxh3_128": "99aa06d3014798d86001c324468d497f", "adler32": "00000001"}
    assert of(b"Wikipedia")["adler32"] == "11e60398"
    assert of(b"abc", "md5", "sha256") == {
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "xxh3_128": xxhash.xxh3_128_hexdigest(b"abc"),
        "md5": "900150983cd24fb0d6963f7d28e17f72",
        "adler32": "024d0127",
    }


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_the_pieces_do_not_matter(pieces):
    hasher = Hasher(["sha256"])
    for piece in pieces:
        hasher.update(memoryview(piece))
    whole = b"".join(pieces)
    assert hasher.checksums().as_dict() == of(whole, "sha256")
    assert hasher.checksums().get("adler32") == f"{zlib.adler32(whole):08x}"
    assert hasher.size_bytes == len(whole)


def test_without_the_fast_library_the_values_are_the_same(monkeypatch):
    fast = of(b"x" * 100_000)
    monkeypatch.setattr(hashing, "adler32", zlib.adler32)
    assert of(b"x" * 100_000) == fast


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(Invalid, match="sha512"):
        Hasher(["sha512"])


def test_crc32c_is_computed_as_others_do():
    assert Hasher(["crc32c"]).checksums().get("crc32c") == "00000000"
    hasher = Hasher(["crc32c"])
    hasher.update(b"123456789")
    assert hasher.checksums().get("crc32c") == "e3069283"


def test_a_further_algorithm_is_computed_only_where_it_proves_more():
    md5, sha = "0" * 32, "0" * 64
    assert extra_for(Checksums.of({"xxh3_128": md5, "md5": md5, "sha256": sha})) == ()
    assert extra_for(Checksums.of({"adler32": "1", "md5": md5})) == ("md5",)
    assert extra_for(Checksums.of({"sha256": sha, "md5": md5})) == ("sha256",)
    assert extra_for(Checksums.of({"adler32": "1"})) == ()
    assert extra_for(Checksums()) == ()
