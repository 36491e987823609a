"""What a name may be, and that an accepted one can become a path without another look."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.errors import Invalid
from rules.names import Did, check_attribute_key, check_did_name, check_scope, check_word, shown
from tests.rules.factories import HOSTILE_NAMES, dids, hostile_texts


def test_a_did_is_split_at_its_first_colon() -> None:
    assert Did.parse("raw:run1/a:b.h5") == Did("raw", "run1/a:b.h5")


def test_a_did_without_a_colon_is_told_how_to_be_written() -> None:
    with pytest.raises(Invalid) as told:
        Did.parse("raw")
    assert "scope:name" in told.value.hint


@given(dids)
def test_a_did_is_the_same_after_printing_and_parsing(did: Did) -> None:
    assert Did.parse(str(did)) == did


def test_one_name_in_two_normal_forms_is_one_name() -> None:
    assert check_did_name("cafe\u0301") == check_did_name("caf\u00e9") == "caf\u00e9"


@given(hostile_texts)
def test_an_accepted_name_is_a_safe_relative_path(text: str) -> None:
    try:
        name = check_did_name(text)
    except Invalid:
        return
    assert len(name.encode()) <= 1024
    assert unicodedata.is_normalized("NFC", name)
    assert not any(unicodedata.category(c).startswith("C") for c in name)
    for segment in name.split("/"):
        assert segment not in ("", ".", "..")
        assert segment == segment.strip()
        assert len(segment.encode()) <= 255
        assert not segment.startswith(".replica")


@given(hostile_texts)
def test_an_accepted_scope_is_one_path_segment(text: str) -> None:
    try:
        scope = check_scope(text)
    except Invalid:
        return
    assert scope == text
    assert scope.isascii()
    assert 1 <= len(scope) <= 64
    assert not set(scope) & set("/\\: \n")
    assert all(scope.split("."))


@pytest.mark.parametrize("text", HOSTILE_NAMES)
def test_a_hostile_name_is_accepted_or_refused_in_few_printable_words(text: str) -> None:
    for check in (check_did_name, check_scope, check_attribute_key, Did.parse, lambda t: check_word(t, "a site")):
        try:
            check(text)
        except Invalid as told:
            assert len(told.message) < 1000
            assert told.message.isprintable()
            assert told.message.encode()
            assert told.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a/../b",
        "a/./b",
        "a//b",
        "/a",
        "a/",
        "a\n",
        "a\0b",
        "a\u202eb",
        "a\u200bb",
        "\ud800",
        "a\\b",
        " a",
    ],
)
def test_what_could_leave_the_root_or_hide_is_no_name(text: str) -> None:
    with pytest.raises(Invalid):
        check_did_name(text)


@pytest.mark.parametrize("text", ["user.", "user..x", "a..", ".a", "-a", "a/b", "a:b", "", "x" * 65, "a\n"])
def test_what_would_not_be_one_plain_segment_is_no_scope(text: str) -> None:
    with pytest.raises(Invalid):
        check_scope(text)


@pytest.mark.parametrize("text", ["user.jdoe", "mc16_13TeV", "a-b.c", "0", "_x", "x" * 64])
def test_usual_scopes_are_accepted(text: str) -> None:
    assert check_scope(text) == text


def test_an_endpoint_may_be_written_in_an_expression() -> None:
    assert check_word("HZDR-DISK", "an endpoint") == "HZDR-DISK"
    for text in ("A--B", "-A", "A-", "A.B", "A B", "A|B", "É", "A" * 65):
        with pytest.raises(Invalid):
            check_word(text, "an endpoint")


@given(st.text())
def test_a_shown_text_is_short_and_ascii(text: str) -> None:
    assert shown(text).replace("…", "").isascii()
    assert len(shown(text)) <= 80 * 10 + 3
