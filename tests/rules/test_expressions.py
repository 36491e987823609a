"""What endpoint expressions select, judged by set algebra written a second time, and by Rucio's own cases."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.endpoints import Endpoint
from rules.errors import InvalidExpression, Refused
from rules.expression_syntax import LENGTH_MAX, NESTING_MAX
from rules.expressions import Chain, Comparison, Everything, Expression, Name, OneOf, parse, select
from rules.states import EndpointKind
from tests.rules.factories import TB, endpoint, names

# The five endpoints of Rucio's tests: a country each, a number each, and two tags.
A = endpoint("A", 1, site="AT1", a="at", n=10, T1=True)
B = endpoint("B", 2, site="DE1", a="de", n=20, T1=True)
C = endpoint("C", 3, site="FR1", a="fr", n=30, T1="True")
D = endpoint("D", 4, site="UK 1", a="uk", n="40", T2=True, kind=EndpointKind.TAPE)
E = endpoint("E", 5, site="US1", a="us", n=50, T2=True, T1=False, free_bytes=5 * TB, x="many")
FIVE = (A, B, C, D, E)


def selected(text: str) -> str:
    return "".join(names(select(text, FIVE)))


# ---- Rucio's cases


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("a=uk", "D"),
        ("*", "ABCDE"),
        ("T1", "ABC"),
        ("(T1)", "ABC"),
        ("T1|T2", "ABCDE"),
        (r"T1\C", "AB"),
        ("T2&a=uk", "D"),
        (r"T1\C|a=fr", "ABC"),
        (r"T1\(C|a=fr)", "AB"),
        (r"(T1|T2)\T2|T2&T1", "ABC"),
        ("(((((T1))))|a=us)&T2|(a=at|a=de)", "ABE"),
        ("(*)&a=at", "A"),
        ("n<11", "A"),
        ("n<21", "AB"),
        ("n>49", "E"),
        ("n>30", "DE"),
        ("A=true", "A"),
        ("A=True", "A"),
        ("T1=TRUE", "ABC"),
        ("T1=false", "E"),
        ("T1>0", "ABC"),  # there, true is 1
        ("n=10", "A"),
        ("n=40", "D"),
        ("n<1e3", "ABCDE"),
        ("n<-1|A", "A"),
        ("x<5|A", "A"),  # what is no number compares with nothing
        ("a=xx|A", "A"),  # a part may be empty
        ("no-such.key=1|A", "A"),
        ("nosuch<1|A", "A"),
    ],
)
def test_an_expression_of_rucio_selects_what_it_selects_there(text: str, expected: str) -> None:
    assert selected(text) == expected


@pytest.mark.parametrize(
    "text", ["A|", "A)", "NOSUCH", "", "(", "()", "|A", "A||B", "AB(C)", "(A)(B)", "a=", "=a", "A-", "a.b"]
)
def test_what_rucio_refuses_and_we_do_not_add_is_refused(text: str) -> None:
    with pytest.raises(InvalidExpression):
        select(text, FIVE)


@pytest.mark.parametrize("text", ["n<9", "n>51", "a=xx", r"*\*", "T1&T2", "a=AT", "n=010", "n=10.0"])
def test_selecting_nothing_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(Refused):
        select(text, FIVE)


# ---- What is added


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" T1 \t\\\n ( C | a = fr ) ", "AB"),
        ("a!=uk", "ABCE"),
        ("T2!=true", "ABC"),  # also where there is no such attribute
        ("n<=20", "AB"),
        ("n>=40", "DE"),
        ("n<10.5", "A"),
        ("a in (at, de)", "AB"),
        ("a in(us)", "E"),
        ("n in (10, 40)", "AD"),
        ('site="UK 1"', "D"),
        ('site in ("UK 1", US1)', "DE"),
        ("kind=tape", "D"),
        ("kind=disk & free_bytes>1e12", "E"),
        ("name=A", "A"),
        ("name in (A, E)", "AE"),
        ('a="uk"', "D"),
    ],
)
def test_what_rucio_has_not(text: str, expected: str) -> None:
    assert selected(text) == expected


def test_a_hyphen_is_part_of_a_name() -> None:
    assert names(select("HZDR-DISK|X", (endpoint("HZDR-DISK"), endpoint("X"), endpoint("HZDR")))) == ["HZDR-DISK", "X"]


def test_in_is_also_a_name() -> None:
    some = (endpoint("in", 1), endpoint("B", 2, **{"in": "x"}))
    assert names(select("in|B", some)) == ["B", "in"]
    assert names(select("in in (x)", some)) == ["B"]


def test_an_endpoint_named_like_a_key_can_be_selected() -> None:
    assert names(select("site", (endpoint("site", 1), endpoint("B", 2)))) == ["site"]


def test_a_quoted_value_can_hold_every_sign() -> None:
    some = (endpoint("A", 1, note='a "b" \\ (c) | é'), endpoint("B", 2, note=""))
    assert names(select(r'note="a \"b\" \\ (c) | é"', some)) == ["A"]
    assert names(select('note=""', some)) == ["B"]


def test_the_result_is_sorted_by_name_whatever_the_order_of_the_endpoints() -> None:
    assert select("*", reversed(FIVE)) == FIVE


def test_a_changed_attribute_counts_at_once() -> None:
    assert names(select("a=de", (A, endpoint("B", 2, a="at"), endpoint("C", 3, a="de")))) == ["C"]


# ---- What is said about a mistake


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 1, "found the end"),
        ("A|", 3, "expected an endpoint"),
        ("A B", 3, "expected an operator"),
        ("A)", 2, "closes nothing"),
        ("A|(B&C", 7, "')' for column 3"),
        ("a=", 3, "expected a value"),
        ("a=|B", 3, "expected a value"),
        ("a=b=c", 4, "expected an operator"),
        ("n<two", 3, "expected a number"),
        ("n>nan", 3, "expected a number"),
        ("a in b", 6, "'(' and the values"),
        ("a in ()", 7, "expected a value"),
        ("a in (b,)", 9, "expected a value"),
        ("a in (b c)", 9, "',' or ')'"),
        ('a="b', 3, "never closed"),
        ('"A"', 1, "quotes are for values"),
        ("A & B--C", 5, "not the name"),
        ("A!B", 2, "no meaning"),
        ("A\uff06B", 2, "no meaning"),
        ("A\u00a0B", 2, "no meaning"),
        ('a="\u202e"', 3, "cannot be seen"),
        ("A|B|HZDR_DISC", 5, "no endpoint and no attribute"),
        ("(" * (NESTING_MAX + 1) + "A" + ")" * (NESTING_MAX + 1), NESTING_MAX + 1, "parentheses are open"),
        ("A|" * LENGTH_MAX + "A", LENGTH_MAX + 1, "characters"),
    ],
)
def test_a_mistake_is_told_with_its_column_and_what_was_expected(text: str, column: int, said: str) -> None:
    with pytest.raises(InvalidExpression) as told:
        select(text, FIVE)
    assert told.value.column == column
    assert said in told.value.message


def test_an_unknown_endpoint_comes_with_a_guess() -> None:
    with pytest.raises(InvalidExpression) as told:
        select("*\\HZDR-DISC", (endpoint("HZDR-DISK"), endpoint("GSI-TAPE")))
    assert told.value.hint == "did you mean `HZDR-DISK`?"


def test_an_unknown_attribute_comes_with_a_guess() -> None:
    with pytest.raises(Refused) as told:
        select("contry=DE", (endpoint("A", country="DE"),))
    assert "no endpoint has the attribute `contry`" in told.value.message
    assert told.value.hint == "did you mean `country`?"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=xx", "no endpoint has `a=xx`"),
        ("T1&T2", "`T1` selects 3, of which none is also in `T2`"),
        ("T1&a=xx", "no endpoint has `a=xx`"),
        (r"T1\C\(A|B)", "`T1\\C` selects 2, of which none is left without `A|B`"),
        ("*&(T2&(n<20|n<5))", "`T2` selects 2, of which none is also in `n<20|n<5`"),
        ("a=xx|a=yy", "no endpoint has `a=xx`"),
        ("a=xx|T1&T2", "`a=xx|T1` selects 3, of which none is also in `T2`"),
        ("x", "`x` is not true at any endpoint"),
    ],
)
def test_an_empty_result_says_which_part_became_empty(text: str, said: str) -> None:
    with pytest.raises(Refused) as told:
        select(text, FIVE)
    assert said in told.value.message


def test_without_any_endpoint_that_is_said() -> None:
    with pytest.raises(Refused, match="there are no endpoints yet"):
        select("*", ())


# ---- Bounds


def test_the_longest_and_the_deepest_text_are_read() -> None:
    assert selected("A" + "|A" * ((LENGTH_MAX - 1) // 2)) == "A"
    assert selected("(" * NESTING_MAX + "A" + ")" * NESTING_MAX) == "A"
    deep = "A|(" * NESTING_MAX + "A" + ")" * NESTING_MAX
    assert parse(str(parse(deep))) == parse(deep)
    assert selected(deep) == "A"


#: Texts that have hurt other parsers.
HOSTILE = [
    *["(" * 10_000, "a|b|" * 25_000, "\\", "&&", "!", r"a\a\a", "tier=1;DROP", "country='", "attr=*", "attr=.*(a+)+$"],
    *["attr>NaN", "n<1e999", "a=b=c", "A\0", "__class__", "id", "1", "n<" + "9" * 400, "--", "/*", '"' + "\\" * 999],
]
PIECES = ["A", "a", "=", "in", "(", ")", "|", "&", "\\", ",", "<", '"', "9", " ", "*"]


@given(
    st.one_of(
        st.text(),
        st.text('ABan12T=<>!&|\\()*," \n._-in', max_size=30),
        st.lists(st.sampled_from(PIECES)).map("".join),
        st.sampled_from(HOSTILE),
    )
)
def test_no_text_does_anything_but_select_or_be_refused(text: str) -> None:
    try:
        assert select(text, FIVE)
    except InvalidExpression as told:
        assert 1 <= told.column <= len(text) + 1
        assert told.message.isprintable()
    except Refused as told:
        assert told.message.isprintable()


# ---- Against set algebra

values = st.sampled_from(["at", "de", "10", "true", "false", "", "UK 1", 'q"u\\o', "é", "0x10", "1e309"])
keys = st.sampled_from(["a", "n", "T1", "site", "kind", "name", "free_bytes", "a.b-c", "in"])
numbers = st.sampled_from(["10", "-5", "25", "1e3", "30.5", "inf", "1_0"])
leaf_trees = st.one_of(
    st.just(Everything()),
    st.sampled_from(["A", "B", "T1", "T2", "site"]).map(Name),
    st.builds(Comparison, keys, st.sampled_from(["=", "!="]), values),
    st.builds(Comparison, keys, st.sampled_from(["<", ">", "<=", ">="]), numbers),
    st.builds(OneOf, keys, st.lists(values, min_size=1, max_size=3).map(tuple)),
)
trees = st.recursive(
    leaf_trees,
    lambda term: st.builds(
        Chain, term, st.lists(st.tuples(st.sampled_from("|&\\"), term), min_size=1, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


@given(trees)
def test_a_printed_tree_parses_to_the_same_tree(tree: Expression) -> None:
    assert parse(str(tree)) == tree


@given(st.text('ABan12T=<>!&|\\()*," ._-in', max_size=40))
def test_a_text_has_the_same_tree_after_printing_and_is_not_longer(text: str) -> None:
    try:
        tree = parse(text)
    except InvalidExpression:
        return
    assert parse(str(tree)) == tree
    assert len(str(tree)) <= len(text)


def facts(e: Endpoint) -> dict[str, object]:
    """All keys of an endpoint as an oracle may see them."""
    kind = "tape" if e.kind is EndpointKind.TAPE else "disk"
    own = {"name": e.name, "site": e.site, "kind": kind, "free_bytes": e.free_bytes, e.name: True}
    return {k: v for k, v in {**e.attributes, **own}.items() if v is not None}


def spelled(value: object) -> str:
    return {"true": "true", "false": "false"}.get(str(value).lower(), str(value))


def numeric(value: object) -> float:
    try:
        return {"true": 1.0, "false": 0.0}.get(str(value).lower()) or float(str(value))
    except ValueError:
        return 0.0 if str(value).lower() == "false" else float("nan")


def oracle(tree: Expression) -> set[str]:
    match tree:
        case Chain(first, rest):
            result = oracle(first)
            for sign, term in rest:
                right = oracle(term)
                result = {"|": result | right, "&": result & right, "\\": result - right}[sign]
            return result
        case Everything():
            return set("ABCDE")
        case Name(name):
            return {e.name for e in FIVE if spelled(facts(e).get(name)) == "true"}
        case OneOf(key, wanted):
            return {e.name for e in FIVE if key in facts(e) and spelled(facts(e)[key]) in map(spelled, wanted)}
        case Comparison(key, "=", value):
            return {e.name for e in FIVE if key in facts(e) and spelled(facts(e)[key]) == spelled(value)}
        case Comparison(key, "!=", value):
            return set("ABCDE") - oracle(Comparison(key, "=", value))
        case Comparison(key, relation, value):
            holds = {
                "<": lambda x, y: x < y,
                ">": lambda x, y: x > y,
                "<=": lambda x, y: x <= y,
                ">=": lambda x, y: x >= y,
            }[relation]
            return {e.name for e in FIVE if key in facts(e) and holds(numeric(facts(e)[key]), float(value))}
    raise AssertionError(tree)


@given(trees)
def test_an_expression_selects_what_set_algebra_says(tree: Expression) -> None:
    expected = oracle(tree)
    try:
        assert set(names(select(str(tree), FIVE))) == expected
    except Refused:
        assert not expected


# ---- Against Rucio's grammar, as a regular expression and a count of parentheses

_LEAF = r"(?:[A-Za-z0-9._-]+[=<>][A-Za-z0-9_-]+|[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*|\*)"
_RUCIO = re.compile(rf"\(*{_LEAF}\)*(?:[|&\\]\(*{_LEAF}\)*)*")


def is_valid_in_rucio(text: str) -> bool:
    balance = 0
    for character in text:
        balance += {"(": 1, ")": -1}.get(character, 0)
        if balance < 0:
            return False
    return balance == 0 and _RUCIO.fullmatch(text) is not None


def rucio(text: str) -> set[str]:
    """Left to right, as Rucio reads a text that is valid there."""
    at = 0

    def term() -> set[str]:
        nonlocal at
        if text[at] == "(":
            at += 1
            result = chain()
            at += 1
            return result
        leaf = re.compile(_LEAF).match(text, at)
        assert leaf
        at = leaf.end()
        if leaf.group() == "*":
            return set("ABCDE")
        key, sign, value = (*re.split("([=<>])", leaf.group(), maxsplit=1), "=", "true")[:3]
        if sign == "=":
            return {e.name for e in FIVE if key in facts(e) and spelled(facts(e)[key]) == spelled(value)}
        pairs = [(e.name, numeric(facts(e)[key])) for e in FIVE if key in facts(e)]
        return {name for name, x in pairs if (x < numeric(value) if sign == "<" else x > numeric(value))}

    def chain() -> set[str]:
        nonlocal at
        result = term()
        while at < len(text) and text[at] in "|&\\":
            sign, at = text[at], at + 1
            right = term()
            result = {"|": result | right, "&": result & right, "\\": result - right}[sign]
        return result

    return chain()


rucio_leaves = st.sampled_from(
    ["A", "B", "T1", "*", "a=de", "a=x_-", "n<21", "n>21", "T2=True", "x>1", "q=1", "-.=-", "n<1_2"]
)
rucio_texts = st.recursive(
    rucio_leaves,
    lambda t: st.one_of(
        t.map("({})".format),
        st.tuples(t, st.sampled_from("|&\\"), t).map("".join),
        st.tuples(t, st.sampled_from("|&\\"), t.map("({})".format)).map("".join),
    ),
    max_leaves=10,
)


@given(rucio_texts)
def test_a_text_that_is_valid_in_rucio_selects_what_it_selects_there(text: str) -> None:
    assert is_valid_in_rucio(text)
    try:
        assert set(names(select(text, FIVE))) == rucio(text)
    except Refused:
        assert not rucio(text)


@given(st.text(r"AB1=<>|&\()*-_", max_size=12))
def test_of_texts_in_the_letters_of_rucio_the_same_are_valid(text: str) -> None:
    """Apart from `<=`, `>=`, and comparing with what is no number."""
    try:
        parse(text)
        valid = True
    except InvalidExpression as told:
        if "expected a number" in told.message:
            return
        valid = False
    assert valid == is_valid_in_rucio(text) or "<=" in text or ">=" in text
