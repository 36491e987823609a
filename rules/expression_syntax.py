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
from typing import Literal, NamedTuple, NoReturn, TypeAlias, cast

from rules.errors import InvalidExpression
from rules.names import shown

LENGTH_MAX = 10_000
NESTING_MAX = 100

Operator = Literal["|", "&", "\\"]
Relation = Literal["=", "!=", "<", ">", "<=", ">="]

OPERATORS = ("|", "&", "\\")
EQUALITIES = ("=", "!=")
INEQUALITIES = ("<", ">", "<=", ">=")

_NAME = re.compile(r"[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
_BARE = re.compile(r"[A-Za-z0-9._-]+")
_BLANK = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(
    r"""(?P<word>[A-Za-z0-9._-]+) | (?P<quoted>"(?:[^"\\]|\\.)*") | (?P<sign><=|>=|!=|[=<>|&\\()*,])""",
    re.VERBOSE | re.DOTALL,
)


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
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _operand(term: Expression) -> str:
    return f"({term})" if isinstance(term, Chain) else str(term)


class _Token(NamedTuple):
    kind: Literal["word", "quoted", "sign", "end"]
    text: str
    column: int

    def is_sign(self, *signs: str) -> bool:
        return self.kind == "sign" and self.text in signs

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else shown(self.text)


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        blank = _BLANK.match(text, at)
        at = blank.end() if blank else at
        if at == len(text):
            yield _Token("end", "", at + 1)
            return
        found = _TOKEN.match(text, at)
        if found is None:
            if text[at] == '"':
                raise _wrong(at + 1, "the quote that opens here is never closed")
            raise _wrong(
                at + 1,
                f"{shown(text[at])} has no meaning here",
                hint="put it in double quotes if it is part of a value",
            )
        yield _Token(cast('Literal["word", "quoted", "sign"]', found.lastgroup), found.group(), at + 1)
        at = found.end()


def _wrong(column: int, what: str, *, hint: str = "") -> InvalidExpression:
    return InvalidExpression(f"column {column}: {what}", column=column, hint=hint)


class _Reader:
    """Recursive descent; `depth` counts the open parentheses and is bounded by NESTING_MAX."""

    def __init__(self, text: str) -> None:
        self._ahead = list(_tokens(text))
        self._ahead.reverse()  # the next token is the last of the list

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
            raise _wrong(token.column, "this ')' closes nothing")
        if token.kind != "end":
            self._expected(token, "an operator ('|', '&' or '\\') or the end")

    @property
    def _next(self) -> _Token:
        return self._ahead[-1]

    def _take(self) -> _Token:
        # The end stays: whoever looks beyond it sees it again.
        return self._ahead[-1] if len(self._ahead) == 1 else self._ahead.pop()

    def _term(self, depth: int) -> Expression:
        token = self._take()
        if token.is_sign("("):
            return self._in_parentheses(token, depth + 1)
        if token.is_sign("*"):
            return Everything(token.column)
        if token.kind == "word":
            return self._name_or_comparison(token)
        if token.kind == "quoted":
            raise _wrong(
                token.column, "quotes are for values", hint='write an endpoint\'s name without them, or name="…"'
            )
        return self._expected(token, "an endpoint, key=value, '*' or '('")

    def _in_parentheses(self, opening: _Token, depth: int) -> Expression:
        if depth > NESTING_MAX:
            raise _wrong(opening.column, f"more than {NESTING_MAX} parentheses are open")
        inner = self.expression(depth)
        if not self._next.is_sign(")"):
            self._expected(self._next, f"an operator, or the ')' for column {opening.column}")
        self._take()
        return inner

    def _name_or_comparison(self, word: _Token) -> Leaf:
        if self._next.is_sign(*EQUALITIES, *INEQUALITIES):
            return self._comparison(word)
        if self._next.kind == "word" and self._next.text == "in":
            return self._one_of(word)
        if not _NAME.fullmatch(word.text):
            raise _wrong(
                word.column,
                f"{shown(word.text)} is not the name of an endpoint or tag",
                hint="names are letters and digits joined by single '_' or '-'; for any other attribute write key=true",
            )
        return Name(word.text, word.column)

    def _comparison(self, key: _Token) -> Comparison:
        relation = cast("Relation", self._take().text)
        token = self._next
        value = self._value()
        if relation in INEQUALITIES and number(value) is None:
            raise _wrong(token.column, f"expected a number, found {shown(value)}", hint="compare texts with = or !=")
        return Comparison(key.text, relation, value, key.column)

    def _one_of(self, key: _Token) -> OneOf:
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
        value = re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
        if not value.isprintable():
            raise _wrong(
                token.column, "a value holds a character that cannot be seen", hint="use printable characters only"
            )
        return value

    @staticmethod
    def _expected(token: _Token, what: str) -> NoReturn:
        raise _wrong(token.column, f"expected {what}, found {token}")
