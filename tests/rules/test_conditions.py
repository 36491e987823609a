"""Conditions: what a text means, what it selects, and where it says that it cannot be read."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.conditions import (
    LENGTH_MAX,
    NESTING_MAX,
    TESTS_MAX,
    And,
    Equals,
    Exists,
    Key,
    Like,
    Not,
    OneOf,
    Or,
    Order,
    comparisons,
    matches,
    parse,
    parse_key,
)
from rules.errors import InvalidExpression

RUN = Key(("run",))
FACTS: dict[str, Any] = {
    "kind": "dataset",
    "name": "run-0017",
    "scope": "p1",
    "account": "alice",
    "created_at": datetime(2026, 3, 1, 12, tzinfo=UTC),
    "closed_at": None,
    "expires_at": None,
    "open": True,
    "monotonic": False,
    "size": None,
    "files": 3,
    "bytes": 10**10,
    "metadata": {
        "run": 17,
        "energy": 9.2,
        "big": 2**62 + 1,
        "good": True,
        "text": "17",
        "none": None,
        "tags": ["raw", 5, True, ["x"]],
        "proposal": {"end": "2026-06-30", "pi": "Müller"},
        "run number": 4,
        "a.b": {"c": 1},
        "name": "inner",
        "0": "zero",
    },
}


def holds(text: str) -> bool:
    return matches(parse(text), FACTS)


def test_and_binds_more_tightly_than_or_and_not_most_tightly() -> None:
    one, two, three = (Equals(RUN, n) for n in (1, 2, 3))
    assert parse("run=1 or run=2 and run=3") == Or((one, And((two, three))))
    assert parse("(run=1 or run=2) and run=3") == And((Or((one, two)), three))
    assert parse("not run=1 and run=2") == And((Not(one), two))
    assert parse("NOT (run=1 OR run=2)") == Not(Or((one, two)))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("run = 17", Equals(RUN, 17)),
        ("run==17.0", Equals(RUN, 17.0)),
        ("run != 17", Not(Equals(RUN, 17))),
        ("run <> 17", Not(Equals(RUN, 17))),
        ("run = '17'", Equals(RUN, "17")),
        ('run = "a \\"b\\" \\\\"', Equals(RUN, 'a "b" \\')),
        ("run = true", Equals(RUN, True)),
        ("run = 'true'", Equals(RUN, "true")),
        ("run = 1e3", Equals(RUN, 1000.0)),
        ("run = 007", Equals(RUN, 7)),
        ("run = 0x11", Equals(RUN, "0x11")),
        ("run = nan", Equals(RUN, "nan")),
        ("run = 1_000", Equals(RUN, "1_000")),
        ("run = 9223372036854775808", Equals(RUN, 2.0**63)),
        ("run = -9223372036854775808", Equals(RUN, -(2**63))),
        ("run = 1e999", Equals(RUN, "1e999")),
        ("run = 10..20", And((Order(RUN, ">=", 10), Order(RUN, "<=", 20)))),
        ("run in 10..20", And((Order(RUN, ">=", 10), Order(RUN, "<=", 20)))),
        ("run between 'a' and b", And((Order(RUN, ">=", "a"), Order(RUN, "<=", "b")))),
        ("run not between 1 and 2", Not(And((Order(RUN, ">=", 1), Order(RUN, "<=", 2))))),
        ("run in (1, b ,'c')", OneOf(RUN, (1, "b", "c"))),
        ("run not in (1)", Not(OneOf(RUN, (1,)))),
        ("run ~ a*", Like(RUN, "a*")),
        ("exists run", Exists(RUN)),
        ("metadata.run >= 5", Order(RUN, ">=", 5)),
        ("kind = file", Equals(Key(("kind",), built_in=True), "file")),
        ("metadata.kind = box", Equals(Key(("kind",)), "box")),
        ('metadata."run number".x = 1', Equals(Key(("run number", "x")), 1)),
        ('"run number" = 1', Equals(Key(("run number",)), 1)),
        ('a."b.c" = 1', Equals(Key(("a", "b.c")), 1)),
        ("bytes > 1.5kB", Order(Key(("bytes",), built_in=True), ">", 1500)),
        ("size < 2GiB", Order(Key(("size",), built_in=True), "<", 2**31)),
        ("métier = ü", Equals(Key(("métier",)), "ü")),
    ],
)
def test_a_text_has_one_tree(text: str, tree: object) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize(
    "text",
    [
        *(
            "run = 17",
            "run = 17.0",
            "run != '17'",
            "text = '17'",
            "text != 17",
            "run > 16",
            "run <= 17",
            "run = 17..17",
        ),
        *(
            "energy between 9 and 10",
            "big = 4611686018427387905",
            "big > 4611686018427387904",
            "big != 4611686018427387904",
        ),
        *("good = true", "good != 1", "good != 'true'", "not good = false", "run != true"),
        *("not exists none", "not none = 5", "none != 5", "not none < 5", "missing != 5", "not missing > 5"),
        *("not exists missing", "exists tags", "not tags = raw", "tags has raw", "tags has 5", "tags has 5.0"),
        *("tags has true", "not tags has x", "not run has 17", "not tags has 1", "tags not has '5'"),
        *(
            "proposal.end >= 2026-06-30",
            "proposal.end < 2026-07-01",
            "proposal.pi = Müller",
            "proposal.pi > N or true=1 or run=17",
        ),
        *(
            "not proposal = Müller",
            "not proposal.end.x = 1",
            "not run.x = 1",
            "exists proposal",
        ),
        *('"run number" = 4', 'metadata."a.b".c = 1', "not a.b.c = 1", "metadata.name = inner", "name = run-0017"),
        *(
            "name like run*",
            "name like 'run-00?7'",
            "not name like RUN*",
            "name like *",
            "name like *17",
            "not name like run",
        ),
        *("name like r*n*1?", "not name like ?", "metadata.0 = zero"),
        *(
            "kind = dataset",
            "kind in (file, dataset)",
            "kind like data*",
            "scope = p1",
            "account != bob",
            "open = true",
        ),
        *("monotonic = false", "files = 3", "bytes = 10GB", "bytes >= 9.9GB", "not exists size", "not size < 5"),
        *(
            "created_at = 2026-03-01",
            "created_at >= 2026-03-01",
            "created_at <= 2026-03-01",
            "not created_at > 2026-03-01",
        ),
        *(
            "not created_at < 2026-03-01",
            "created_at in 2026-02-01..2026-03-01",
            "created_at in (2026-01-01, 2026-03-01)",
        ),
        *(
            "created_at = 2026-03-01T12:00:00Z",
            "created_at = 2026-03-01T13:00:00+01:00",
            "created_at = '2026-03-01 12:00'",
        ),
        *("created_at > 2026-03-01T11:59:59.999999", "not exists closed_at", "closed_at != 2026-01-01"),
    ],
)
def test_what_holds(text: str) -> None:
    assert holds(text)
    assert not holds(f"not ({text})")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected a key, 'not', 'exists' or '(', found the end"),
        ("run", 4, "expected a comparison"),
        ("run =", 6, "expected a value, found the end"),
        ("run = (", 7, "expected a value, found '('"),
        ("run = 1 scope = 2", 9, "expected 'and', 'or' or the end, found 'scope'"),
        ("(run = 1", 9, "the ')' for column 1, found the end"),
        ("run = 1)", 8, "this ')' closes nothing"),
        ("run = 1 and", 12, "expected a key"),
        ("run in 5", 8, "expected '(' and the values"),
        ("run in (1 2)", 11, "expected ',' or ')', found '2'"),
        ("run in ()", 9, "expected a value, found ')'"),
        ("run between 1 or 2", 15, "expected 'and' and the end of the range"),
        ("run = 1..", 7, "'1..' is not a range"),
        ("run = 1..2..3", 7, "is not a range"),
        ("run not = 1", 9, "expected a comparison"),
        ("run > true", 7, "expected a number or a text, found 'true'"),
        ("run like a*a*a*a*a*a*", 10, "the pattern has 6 stars"),
        ('run = "abc', 7, "the quote that opens here is never closed"),
        ('run = a"b"', 8, "expected 'and', 'or' or the end"),
        ("run..x = 1", 5, "'run..x' is not a key"),
        ("run/x = 1", 4, "expected a dot or the end of the key"),
        ("kind = box", 8, "expected one of file, dataset, container, found 'box'"),
        ("open > true", 8, "expected a number or a text"),
        ("open = 1", 8, "expected true or false"),
        ("bytes = many", 9, "expected a number, or a size such as 10GB"),
        ("bytes like 1*", 1, "bytes is not a text"),
        ("created_at > soon", 14, "expected a date for created_at"),
        ("created_at = 2026-02-30", 14, "expected a date"),
        ("created_at = 10..20", 14, "expected a date"),
        ("created_at in (2026-01-01, x)", 28, "expected a date"),
        ("name has x", 1, "name is not a list"),
        ("name.first = x", 1, "name has nothing inside"),
        ("run = a\x1bb", 7, "a character that cannot be seen"),
        ('run = "\ud800"', 7, "a value holds a character that no text has"),
        ('run = "\0"', 7, "a value holds a character that no text has"),
        (".".join("a" * 17) + " = 1", 1, "the key has 17 parts"),
        ("(" * 21 + "run=1" + ")" * 21, 21, f"more than {NESTING_MAX} parentheses and 'not' are open"),
        ("not " * 21 + "run=1", 81, f"more than {NESTING_MAX} parentheses and 'not' are open"),
        (" or ".join(["a=1"] * (TESTS_MAX + 1)), 3504, f"more than {TESTS_MAX} comparisons"),
        ("a" * (LENGTH_MAX + 1), LENGTH_MAX + 1, "has 10001 characters"),
    ],
)
def test_what_cannot_be_read_says_where_and_why(text: str, column: int, message: str) -> None:
    with pytest.raises(InvalidExpression) as refusal:
        parse(text)
    assert message in refusal.value.message
    assert (refusal.value.column, refusal.value.field) == (column, "where")
    assert refusal.value.message.startswith(f"column {column}: ")


def test_a_hint_says_what_was_meant() -> None:
    with pytest.raises(InvalidExpression) as refusal:
        parse("kind = datset")
    assert refusal.value.hint == "did you mean dataset?"


def test_the_bounds_themselves_are_allowed() -> None:
    assert sum(1 for _ in comparisons(parse(" or ".join(["a=1"] * TESTS_MAX)))) == TESTS_MAX
    assert holds("(" * NESTING_MAX + "run=17" + ")" * NESTING_MAX)


def test_a_key_is_printed_as_it_is_read() -> None:
    for key in (RUN, Key(("a", "b.c", 'd"e\\f', "")), Key(("name",)), Key(("name",), built_in=True), Key(("ü-1",))):
        assert parse_key(str(key)) == key


@pytest.mark.parametrize("text", ["*a*a*a*a*b", "a*a*a*a*?b"])
def test_a_pattern_is_never_slow(text: str) -> None:
    assert not matches(parse(f"x like '{text}'"), {"metadata": {"x": "a" * 3_000}})


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="ab=<>!()'\".,~ notrinexistsand120", max_size=40))
def test_every_text_is_read_or_refused_with_its_column(text: str) -> None:
    try:
        tree = parse(text)
    except InvalidExpression as error:
        assert 1 <= error.column <= len(text) + 1
    else:
        assert matches(tree, FACTS) in (True, False)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab", max_size=12), st.text(alphabet="ab*?", max_size=8).filter(lambda p: p.count("*") <= 5))
def test_like_is_what_a_regular_expression_says(text: str, pattern: str) -> None:
    expected = re.fullmatch(pattern.replace("*", "[ab]*").replace("?", "[ab]"), text) is not None
    assert matches(Like(RUN, pattern), {"metadata": {"run": text}}) is expected
