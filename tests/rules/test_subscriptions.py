"""What a subscription makes of a DID's metadata."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import conditions, expression_syntax
from rules.errors import InvalidExpression
from rules.expression_syntax import Comparison
from rules.subscriptions import Lacking, Template, Wish, check, decide

RAW = conditions.parse("kind = dataset and metadata.type = raw")


def filled(expression: str, **metadata: object) -> Wish | Lacking:
    facts = {"kind": "dataset", "metadata": {"type": "raw", **metadata}}
    (decided,) = decide(RAW, [Template(7, expression)], facts)
    assert decided.number == 7
    return decided


def expression(text: str, **metadata: object) -> str:
    wish = filled(text, **metadata)
    assert isinstance(wish, Wish), wish
    return wish.expression


def test_nothing_is_made_where_the_condition_does_not_hold() -> None:
    assert decide(RAW, [Template(0, "*")], {"kind": "dataset", "metadata": {"type": "log"}}) == []
    assert decide(RAW, [Template(0, "*")], {"kind": "container", "metadata": {"type": "raw"}}) == []


def test_placeholders_become_values_with_the_quotes_they_need() -> None:
    assert expression("site={metadata.at}&tier<{metadata.n}", at="DESY", n=3) == "site=DESY&tier<3"
    assert expression("site={metadata.at}", at="KIT Tier 1") == 'site="KIT Tier 1"'
    assert expression('site="at {metadata.at}"', at='a"b\\') == 'site="at a\\"b\\\\"'
    assert expression("fast={metadata.fast}", fast=True) == "fast=true"
    assert expression("site={metadata.a.b}", a={"b": "x"}) == "site=x"
    assert expression("{metadata.home}", home="DESY-DISK") == "DESY-DISK"


def test_what_metadata_lack_makes_no_rule_and_says_what() -> None:
    for metadata in ({}, {"at": None}, {"at": ""}, {"at": ["DESY"]}, {"at": {"x": 1}}):
        lacking = filled("kind=disk|site={metadata.at}", **metadata)
        assert isinstance(lacking, Lacking)
        assert "at" in lacking.reason


@given(st.text(min_size=1, max_size=40))
def test_no_metadata_can_change_the_expression_around_it(value: str) -> None:
    wish = filled("site={metadata.at}&kind=disk", at=value)
    if isinstance(wish, Wish):
        tree = expression_syntax.parse(wish.expression)
        assert isinstance(tree, expression_syntax.Chain)
        assert tree.first == Comparison("site", "=", value)
        assert tree.rest == (("&", Comparison("kind", "=", "disk")),)
    else:
        assert wish.reason


def test_as_an_endpoints_name_metadata_give_a_name_or_nothing() -> None:
    assert isinstance(filled("{metadata.home}", home="A|B"), Lacking)
    assert isinstance(filled("{metadata.home}", home="*"), Lacking)


@pytest.mark.parametrize(
    ("text", "column"),
    [("site={metadata.at}&", 20), ("kind=disk&{name}", 11), ("x={metadata.}", 3), ("x={metadata.at", 3)],
)
def test_a_template_that_can_never_be_read_is_refused_with_its_column(text: str, column: int) -> None:
    with pytest.raises(InvalidExpression) as refused:
        check(text, "expression")
    assert refused.value.column == column


def test_templates_that_may_be_read_are_told_apart_from_plain_expressions() -> None:
    assert check('site="{metadata.at}"&tier<{metadata.tier}', "expression")
    assert not check("kind=disk", "expression")
