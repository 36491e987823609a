"""When two sets of checksums agree."""

from __future__ import annotations

import pytest

from rules.checksums import DIGITS, Agreement, Checksum, Checksums, packed
from rules.errors import Invalid


def test_a_leading_zero_that_a_storage_dropped_comes_back() -> None:
    assert Checksum("adler32", "1A2B3C") == Checksum("adler32", "001a2b3c")


def test_a_strong_checksum_must_be_whole() -> None:
    with pytest.raises(Invalid):
        Checksum("md5", "1a2b")


@pytest.mark.parametrize("value", ["", "xyz", "0x1234", "123456789", "12 34"])
def test_what_is_not_hexadecimal_of_the_right_length_is_refused(value: str) -> None:
    if value == "":
        assert Checksum("adler32", value).value == "00000000"
        return
    with pytest.raises(Invalid):
        Checksum("adler32", value)


def test_an_unknown_algorithm_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(Invalid) as told:
        Checksums.of({"adler32": "1", "crc64": "1"})
    assert all(algorithm in told.value.hint for algorithm in DIGITS)


def test_no_common_algorithm_proves_nothing() -> None:
    assert Checksums.of({"adler32": "1"}).compare(Checksums.of({"md5": "0" * 32})) is Agreement.UNKNOWN
    assert Checksums().compare(Checksums()) is Agreement.UNKNOWN


def test_one_difference_outweighs_every_agreement() -> None:
    ours = Checksums.of({"adler32": "1", "md5": "0" * 32})
    assert ours.compare(Checksums.of({"adler32": "1"})) is Agreement.AGREE
    assert ours.compare(Checksums.of({"adler32": "1", "md5": "1" * 32})) is Agreement.DIFFER


def test_the_strongest_comes_first_whatever_the_order_given() -> None:
    assert list(Checksums.of({"adler32": "1", "sha256": "0" * 64}).as_dict()) == ["sha256", "adler32"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"md5": "0123456789abcdef0123456789ABCDEF"},
        {"adler32": "1234", "crc32c": "0000abcd"},
        {"adler32": "12 34 56"},
        {"crc32c": "aa bb cc"},
        {"adler32": "123456789"},
        {"sha256": "zz"},
        {"md5": ""},
        {"rot13": "00"},
        {"rot13": ""},
        {"sha256": "0" * 64, "rot13": ""},
    ],
)
def test_packed_takes_and_refuses_what_checksums_do(values: dict[str, str]) -> None:
    try:
        given = Checksums.of(values).as_dict()
    except Invalid as refusal:
        with pytest.raises(Invalid) as also:
            packed(values)
        assert str(also.value) == str(refusal)
    else:
        assert packed(values) == tuple(bytes.fromhex(given[a]) if a in given else None for a in DIGITS)
