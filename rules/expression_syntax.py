"""Endpoint expressions as text and as a tree.

Given     a text such as `kind=disk & site in (HZDR, KIT) \\ HZDR-DISK`.
Returns   its tree; `str` of a tree is a text that parses to the same tree.
Promises  a text that is valid in Rucio is valid here and has the same tree; every other failure is an InvalidExpression
          with the column (from 1) and what was expected there. Length and nesting are bounded, so no text can hurt.
Partner   rules.expressions says which endpoints a tree selects.

    expression  = term { ("|" | "&" | "\\") term }          equal precedence, strictly left to right
    term        = "(" expression ")" | "*" | name | comparison
    comparison  = key ("=" | "!=") value | key ("<" | ">" | "<=" | ">=") number | key "in" "(" value { "," value } ")"
    name        = letters and digits, joined by single "_" or "-"
    key         = letters, digits, ".", "_", "-"
    value       = the same characters as a key, or any printable text in double quotes (\\" and \\\\ inside)

Rucio has of these only `=`, `<`, `>` and unquoted values without dots, and no white space. Two texts that Rucio accepts
and that silently select nothing there are errors here, because they are slips: comparing with what is no number
(`tier<two`), and, when the endpoints are known, a name that nothing bears.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from rules.errors import InvalidExpression
from rules.names import shown
from rules.tokens import Reader, Token, quoted, unescaped

LENGTH_MAX = 10_000
NESTING_MAX = 100

Operator = Literal["|", "&", "\\"]
Relation = Literal["=", "!=", "<", ">", "<=", ">="]

OPERATORS = ("|", "&", "\\")
EQUALITIES = ("=", "!=")
INEQUALITIES = ("<", ">", "<=", ">=")

_NAME = re.compile(r"[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
_BARE = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Everything:
    """`*`; like every leaf it knows its column, which does not count when two trees are compared."""

    column: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return "*"


@dataclass(frozen=True, slots=True)
class Name:
    """An endpoint's name, or an attribute that is true."""

    name: str
    column: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Comparison:
    """`key=value` and its relatives; the value is kept as it was written."""

    key: str
    relation: Relation
    value: str
    column: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.key}{self.relation}{_written(self.value)}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """`key in (a, b)`; printed without spaces, so that no text grows beyond LENGTH_MAX by being printed."""

    key: str
    values: tuple[str, ...]
    column: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.key} in({','.join(map(_written, self.values))})"


@dataclass(frozen=True, slots=True)
class Chain:
    """Terms joined by operators, from left to right. Flat, so its depth is that of the parentheses."""

    first: Expression
    rest: tuple[tuple[Operator, Expression], ...]

    def __str__(self) -> str:
        return _operand(self.first) + "".join(operator + _operand(term) for operator, term in self.rest)


Leaf: TypeAlias = Everything | Name | Comparison | OneOf
Expression: TypeAlias = Leaf | Chain


def parse(text: str) -> Expression:
    """The tree of `text`, or InvalidExpression."""
    if len(text) > LENGTH_MAX:
        raise InvalidExpression(
            f"the expression has {len(text)} characters, more than {LENGTH_MAX}",
            column=LENGTH_MAX + 1,
            hint="give the endpoints a common attribute and select by it",
        )
    reader = _Reader(text)
    tree = reader.expression(depth=0)
    reader.expect_end()
    return tree


def leaves(tree: Expression) -> Iterator[Leaf]:
    """All leaves, in the order of the text."""
    if not isinstance(tree, Chain):
        yield tree
        return
    yield from leaves(tree.first)
    for _, term in tree.rest:
        yield from leaves(term)


def number(text: str) -> float | None:
    """The number a text is, as Rucio reads it; None for any other text, and for `nan`, which compares with nothing."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _written(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    return quoted(value)


def _operand(term: Expression) -> str:
    return f"({term})" if isinstance(term, Chain) else str(term)


class _Reader(Reader):
    """`depth` counts the open parentheses and is bounded by NESTING_MAX."""

    TOKEN = re.compile(
        r"""(?P<word>[A-Za-z0-9._-]+) | (?P<quoted>"(?:[^"\\]|\\.)*") | (?P<sign><=|>=|!=|[=<>|&\\()*,])""",
        re.VERBOSE | re.DOTALL,
    )
    QUOTES = '"'
    MEANINGLESS = "put it in double quotes if it is part of a value"
    FIELD = "expression"

    def expression(self, depth: int) -> Expression:
        first = self._term(depth)
        rest: list[tuple[Operator, Expression]] = []
        while self._next.is_sign(*OPERATORS):
            operator = cast("Operator", self._take().text)
            rest.append((operator, self._term(depth)))
        return Chain(first, tuple(rest)) if rest else first

    def expect_end(self) -> None:
        token = self._next
        if token.is_sign(")"):
            raise self.wrong(token.column, "this ')' closes nothing")
        if token.kind != "end":
            self._expected(token, "an operator ('|', '&' or '\\') or the end")

    def _term(self, depth: int) -> Expression:
        token = self._take()
        if token.is_sign("("):
            return self._in_parentheses(token, depth + 1)
        if token.is_sign("*"):
            return Everything(token.column)
        if token.kind == "word":
            return self._name_or_comparison(token)
        if token.kind == "quoted":
            raise self.wrong(
                token.column, "quotes are for values", hint='write an endpoint\'s name without them, or name="…"'
            )
        return self._expected(token, "an endpoint, key=value, '*' or '('")

    def _in_parentheses(self, opening: Token, depth: int) -> Expression:
        if depth > NESTING_MAX:
            raise self.wrong(opening.column, f"more than {NESTING_MAX} parentheses are open")
        inner = self.expression(depth)
        if not self._next.is_sign(")"):
            self._expected(self._next, f"an operator, or the ')' for column {opening.column}")
        self._take()
        return inner

    def _name_or_comparison(self, word: Token) -> Leaf:
        if self._next.is_sign(*EQUALITIES, *INEQUALITIES):
            return self._comparison(word)
        if self._next.kind == "word" and self._next.text == "in":
            return self._one_of(word)
        if not _NAME.fullmatch(word.text):
            raise self.wrong(
                word.column,
                f"{shown(word.text)} is not the name of an endpoint or tag",
                hint="names are letters and digits joined by single '_' or '-'; for any other attribute write key=true",
            )
        return Name(word.text, word.column)

    def _comparison(self, key: Token) -> Comparison:
        relation = cast("Relation", self._take().text)
        token = self._next
        value = self._value()
        if relation in INEQUALITIES and number(value) is None:
            raise self.wrong(
                token.column, f"expected a number, found {shown(value)}", hint="compare texts with = or !="
            )
        return Comparison(key.text, relation, value, key.column)

    def _one_of(self, key: Token) -> OneOf:
        self._take()
        if not self._next.is_sign("("):
            self._expected(self._next, "'(' and the values")
        self._take()
        values = [self._value()]
        while self._next.is_sign(","):
            self._take()
            values.append(self._value())
        if not self._next.is_sign(")"):
            self._expected(self._next, "',' or ')'")
        self._take()
        return OneOf(key.text, tuple(values), key.column)

    def _value(self) -> str:
        token = self._take()
        if token.kind == "word":
            return token.text
        if token.kind != "quoted":
            self._expected(token, "a value")
        value = unescaped(token.text[1:-1])
        if not value.isprintable():
            raise self.wrong(
                token.column, "a value holds a character that cannot be seen", hint="use printable characters only"
            )
        return value
