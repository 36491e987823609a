"""Conditions on DIDs: which of them a text selects, by their metadata and by what the catalogue itself knows of them.

Given     a text such as `kind = dataset and proposal.end >= 2026-01-01 and not detector in (eiger, jungfrau)`.
Returns   its tree; and of the facts about one DID, whether the tree holds for them.
Promises  no value is an error: what cannot be compared does not match. Numbers are compared as numbers, texts by code
          point. A text that cannot be read is InvalidExpression with the column (from 1) and what was expected there.
          Length, nesting and the number of tests are bounded, so no text can hurt.
Partner   replica.catalog.conditions asks the same of a database; a subscription asks it of one DID at a time.

    condition  = all { "or" all }                          "and" binds more tightly than "or", "not" most tightly
    all        = one { "and" one }
    one        = "not" one | "(" condition ")" | "exists" key | test
    test       = key ("=" | "!=") value | key ("<" | "<=" | ">" | ">=") value | key "=" value ".." value
               | key "between" value "and" value | key "in" "(" value { "," value } ")" | key "in" value ".." value
               | key "like" text | key "has" value
    key        = words joined by "."; a word with other characters than letters, digits, "_" and "-" in double quotes
    value      = a text in quotes, or a bare word: `true`, `false`, a number, else a text

    kind name scope account                text       files size bytes               numbers; `10 GB` is written 10GB
    created_at closed_at expires_at        instants   open monotonic                 true or false
    anything else, and metadata.anything   as the metadata has it: text, number, true or false, list

`size` is that of a file; `bytes` and `files` are those of a file or dataset. A container has none of the three.

- `!=` holds wherever `=` does not, also where the key is missing, as in endpoint expressions; so does every `not`.
- Both ends of a range belong to it. In `like`, `*` stands for any text and `?` for any character; case counts.
- `has` asks whether a list of the metadata has the value as an element. `exists` is false for null, as for nothing.
- Of an instant a date is the whole day: `created_at = 2026-03-01`, `created_at <= 2026-03-31`; without a zone, UTC.
- In metadata a date is a text; dates written by ISO 8601 come in their order.
- `==` and `~` are `=` and `like`; words of the language may be written in capitals.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never

from rules.errors import InvalidExpression
from rules.names import shown
from rules.tokens import Reader, Token, quoted, unescaped

LENGTH_MAX = 10_000
NESTING_MAX = 20
#: How many comparisons a condition has at most; each value of `in` counts as one.
TESTS_MAX = 500
SEGMENTS_MAX = 16
#: A pattern with more stars takes a database longer than anybody waits.
STARS_MAX = 5
PATTERN_LENGTH_MAX = 1_024

Relation = Literal["<", "<=", ">", ">="]
Value: TypeAlias = "str | int | float | bool"
Type = Literal["text", "number", "instant", "flag", "any"]

#: The keys that every DID has by itself, and what they are; all others are keys of its metadata.
BUILT_IN: Mapping[str, Type] = {
    **dict.fromkeys(("kind", "name", "scope", "account"), "text"),
    **dict.fromkeys(("files", "size", "bytes"), "number"),
    **dict.fromkeys(("created_at", "closed_at", "expires_at"), "instant"),
    **dict.fromkeys(("open", "monotonic"), "flag"),
}
KINDS = ("file", "dataset", "container")
METADATA = "metadata"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_INTEGER_MAX = 2**63 - 1

_SIGNS = {"==": "=", "~": "like", "<>": "!="}
_SEGMENT = re.compile(r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>\w[\w-]*)', re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKMGTPE])(i?)B")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True)
class Key:
    """What is compared: one of BUILT_IN, or a path into the metadata. Its column does not count when keys compare."""

    path: tuple[str, ...]
    built_in: bool = False
    column: int = field(default=0, compare=False, repr=False)

    @property
    def type(self) -> Type:
        return BUILT_IN[self.path[0]] if self.built_in else "any"

    def __str__(self) -> str:
        if self.built_in:
            return self.path[0]
        return ".".join((METADATA, *map(_segment_text, self.path)))


@dataclass(frozen=True, slots=True)
class Equals:
    key: Key
    value: Value


@dataclass(frozen=True, slots=True)
class OneOf:
    key: Key
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """`key < value` and its relatives: numbers with a number, texts with a text; instants are microseconds."""

    key: Key
    relation: Relation
    value: str | int | float


@dataclass(frozen=True, slots=True)
class Like:
    key: Key
    pattern: str


@dataclass(frozen=True, slots=True)
class Has:
    key: Key
    value: Value


@dataclass(frozen=True, slots=True)
class Exists:
    key: Key


@dataclass(frozen=True, slots=True)
class Not:
    of: Condition


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Condition, ...]


Test: TypeAlias = Equals | OneOf | Order | Like | Has | Exists
Condition: TypeAlias = "Test | Not | And | Or"


def parse(text: str) -> Condition:
    """The tree of `text`, or InvalidExpression."""
    if len(text) > LENGTH_MAX:
        raise _Reader.wrong(LENGTH_MAX + 1, f"the condition has {len(text)} characters, more than {LENGTH_MAX}")
    reader = _Reader(text)
    tree = reader.condition(depth=0)
    reader.expect_end()
    return tree


def parse_key(text: str) -> Key:
    """A key alone, as `sort` and the metadata verbs take it."""
    reader = _Reader(text)
    key = reader.key()
    reader.expect_end()
    return key


def matches(tree: Condition, facts: Mapping[str, Any]) -> bool:
    """Whether the condition holds. `facts` has the keys of BUILT_IN, and `metadata`: a mapping, or None."""
    match tree:
        case And(parts):
            return all(matches(part, facts) for part in parts)
        case Or(parts):
            return any(matches(part, facts) for part in parts)
        case Not(of):
            return not matches(of, facts)
        case _:
            return _holds(tree, _look_up(tree.key, facts))


def comparisons(tree: Condition) -> Iterator[Test]:
    """All comparisons, in the order of the text."""
    match tree:
        case And(parts) | Or(parts):
            for part in parts:
                yield from comparisons(part)
        case Not(of):
            yield from comparisons(of)
        case _:
            yield tree


def micros(moment: datetime) -> int:
    """Microseconds since 1970, without rounding."""
    return (moment - _EPOCH) // _MICROSECOND


# --- comparing --------------------------------------------------------------------------------------------------------


def _look_up(key: Key, facts: Mapping[str, Any]) -> Any:
    value: Any = facts if key.built_in else facts.get(METADATA)
    for segment in key.path:
        value = value.get(segment) if isinstance(value, Mapping) else None
    return micros(value) if isinstance(value, datetime) else value


def _holds(test: Test, value: Any) -> bool:
    match test:
        case Equals(_, wanted):
            return _equal(value, wanted)
        case OneOf(_, values):
            return any(_equal(value, wanted) for wanted in values)
        case Order(_, relation, bound):
            return _in_order(value, relation, bound)
        case Like(_, pattern):
            return isinstance(value, str) and _like(value, pattern)
        case Has(_, wanted):
            return isinstance(value, list | tuple) and any(_equal(element, wanted) for element in value)
        case Exists():
            return value is not None
    assert_never(test)


def _equal(value: Any, wanted: Value) -> bool:
    return _kind(value) is not None and _kind(value) == _kind(wanted) and bool(_number(value) == _number(wanted))


def _in_order(value: Any, relation: Relation, bound: str | int | float) -> bool:
    if _kind(value) != _kind(bound):
        return False
    value, bound = _number(value), _number(bound)
    match relation:
        case "<":
            return bool(value < bound)
        case "<=":
            return bool(value <= bound)
        case ">":
            return bool(value > bound)
        case ">=":
            return bool(value >= bound)
    assert_never(relation)


def _kind(value: Any) -> type | None:
    """Values of one kind can be compared; true is no number."""
    match value:
        case bool():
            return bool
        case int() | float():
            return float
        case str():
            return str
    return None


def _number(value: Any) -> Any:
    """A database has no integers of any length: what 64 bits do not hold is a floating-point number there."""
    if type(value) is int and not -_INTEGER_MAX - 1 <= value <= _INTEGER_MAX:
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, value)
    return value


def _like(text: str, pattern: str) -> bool:
    """Never slower than length × length, whatever the pattern: a star that failed is tried one character further on,
    and only the last one."""
    at = in_pattern = resume = 0
    star = -1
    while at < len(text):
        wanted = pattern[in_pattern] if in_pattern < len(pattern) else ""
        if wanted == "*":
            star, resume = in_pattern, at
            in_pattern += 1
        elif wanted in ("?", text[at]) and wanted:
            at += 1
            in_pattern += 1
        elif star >= 0:
            resume += 1
            at, in_pattern = resume, star + 1
        else:
            return False
    return not pattern[in_pattern:].strip("*")


# --- reading ----------------------------------------------------------------------------------------------------------


def _unquoted(text: str, column: int) -> str:
    value = unescaped(text)
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in value):
        raise _Reader.wrong(column, "a value holds a character that no text has")
    return value


def _segment_text(segment: str) -> str:
    if re.fullmatch(r"\w[\w-]*", segment):
        return segment
    return quoted(segment)


class _Literal(NamedTuple):
    """A value as it was written; what it means is known when the key is."""

    text: str
    quoted: bool
    column: int

    def of_metadata(self) -> Value:
        """A bare word that looks like a number is one."""
        if self.quoted:
            return self.text
        if self.text.lower() in ("true", "false"):
            return self.text.lower() == "true"
        number = _as_number(self.text)
        return self.text if number is None else number


class _Reader(Reader):
    """`depth` counts what is open and is bounded by NESTING_MAX."""

    TOKEN = re.compile(
        r"""(?P<quoted>"(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*')
          | (?P<sign><=|>=|!=|<>|==|[=<>~(),])
          | (?P<word>(?:\."(?:[^"\\]|\\.)*"|[^\s"'<>=!~(),])+)""",
        re.VERBOSE | re.DOTALL,
    )
    QUOTES = "\"'"
    MEANINGLESS = "put values with signs in double quotes"
    FIELD = "where"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._tests = 0

    @classmethod
    def _tokens(cls, text: str) -> Iterator[Token]:
        for token in super()._tokens(text):
            # A regular expression takes for a blank more than we do.
            if token.kind == "word" and not token.text.isprintable():
                raise cls.wrong(
                    token.column, "a character that cannot be seen", hint="put it in double quotes if a value has it"
                )
            yield token

    def condition(self, depth: int) -> Condition:
        parts = [self._all(depth)]
        while self._next.is_word("or"):
            self._take()
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def expect_end(self) -> None:
        token = self._next
        if token.is_sign(")"):
            raise self.wrong(token.column, "this ')' closes nothing")
        if token.kind != "end":
            self._expected(token, "'and', 'or' or the end", hint="put a value of several words in double quotes")

    def key(self) -> Key:
        token = self._take()
        if token.kind == "quoted" and token.text[0] == '"':
            return Key((_unquoted(token.text[1:-1], token.column),), column=token.column)
        if token.kind != "word" or token.is_word("and", "or", "between", "in", "like", "has"):
            self._expected(token, "a key, 'not', 'exists' or '('")
        path = self._path(token)
        if path[0] == METADATA and len(path) > 1:
            return Key(path[1:], column=token.column)
        if path[0] in BUILT_IN and len(path) == 1:
            return Key(path, built_in=True, column=token.column)
        if path[0] in BUILT_IN:
            raise self.wrong(
                token.column,
                f"{path[0]} has nothing inside",
                hint=f"write metadata.{token.text} if you mean a key of the metadata",
            )
        return Key(path, column=token.column)

    @staticmethod
    def _path(token: Token) -> tuple[str, ...]:
        segments: list[str] = []
        at = 0
        while True:
            found = _SEGMENT.match(token.text, at)
            if found is None:
                raise _Reader.wrong(
                    token.column + at,
                    f"{shown(token.text)} is not a key",
                    hint='keys are words joined by dots; put a word with other signs in quotes: metadata."run number"',
                )
            plain = found["plain"]
            segments.append(_unquoted(found["quoted"], token.column) if plain is None else plain)
            at = found.end()
            if at == len(token.text):
                break
            if token.text[at] != ".":
                raise _Reader.wrong(token.column + at, f"expected a dot or the end of the key in {shown(token.text)}")
            at += 1
        if len(segments) > SEGMENTS_MAX:
            raise _Reader.wrong(token.column, f"the key has {len(segments)} parts", hint=f"at most {SEGMENTS_MAX}")
        return tuple(segments)

    def _all(self, depth: int) -> Condition:
        parts = [self._one(depth)]
        while self._next.is_word("and"):
            self._take()
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _one(self, depth: int) -> Condition:
        token = self._next
        if (token.is_word("not") or token.is_sign("(")) and depth == NESTING_MAX:
            raise self.wrong(token.column, f"more than {NESTING_MAX} parentheses and 'not' are open")
        if token.is_word("not"):
            self._take()
            return Not(self._one(depth + 1))
        if token.is_sign("("):
            self._take()
            inner = self.condition(depth + 1)
            if not self._next.is_sign(")"):
                self._expected(self._next, f"'and', 'or', or the ')' for column {token.column}")
            self._take()
            return inner
        if token.is_word("exists"):
            self._take()
            self._count()
            return Exists(self.key())
        return self._test()

    def _count(self) -> None:
        self._tests += 1
        if self._tests > TESTS_MAX:
            raise self.wrong(self._next.column, f"more than {TESTS_MAX} comparisons", hint="ask twice")

    def _test(self) -> Condition:
        key = self.key()
        token = self._take()
        sign = _SIGNS.get(token.text, token.text) if token.kind == "sign" else ""
        match sign:
            case "=":
                return self._value_or_range(key)
            case "!=":
                return Not(self._value_or_range(key))
            case "<" | "<=" | ">" | ">=":
                return self._order(key, sign, self._literal())
            case "like":
                return self._like(key)
        if token.is_word("not"):
            return Not(self._in_words(key, self._take()))
        return self._in_words(key, token)

    def _in_words(self, key: Key, operator: Token) -> Condition:
        if operator.is_word("in"):
            return self._in(key)
        if operator.is_word("like"):
            return self._like(key)
        if operator.is_word("between"):
            return self._between(key)
        if operator.is_word("has"):
            return self._has(key)
        return self._expected(
            operator,
            "a comparison (= != < <= > >= in between like has)",
            hint=f"to ask whether there is one: exists {key}",
        )

    def _between(self, key: Key) -> Condition:
        first = self._literal()
        if not self._next.is_word("and"):
            self._expected(self._next, "'and' and the end of the range")
        self._take()
        return self._range(key, first, self._literal())

    def _has(self, key: Key) -> Condition:
        if key.built_in:
            raise self.wrong(key.column, f"{key} is not a list", hint="compare it with =")
        self._count()
        return Has(key, self._literal().of_metadata())

    def _in(self, key: Key) -> Condition:
        if not self._next.is_sign("("):
            token = self._next
            found = self._value_or_range(key)
            if isinstance(found, Equals):
                self._expected(token, "'(' and the values, or a range such as 10..20")
            return found
        self._take()
        values = [self._literal()]
        while self._next.is_sign(","):
            self._take()
            values.append(self._literal())
        if not self._next.is_sign(")"):
            self._expected(self._next, "',' or ')'", hint="put a value of several words in double quotes")
        self._take()
        if key.type == "instant":
            return Or(tuple(self._equals(key, value) for value in values))
        for _ in values:
            self._count()
        return OneOf(key, tuple(_typed(key, value) for value in values))

    def _like(self, key: Key) -> Condition:
        if key.type not in ("text", "any"):
            raise self.wrong(key.column, f"{key} is not a text", hint="compare it with = or give a range")
        pattern = self._literal()
        stars = pattern.text.count("*")
        if stars > STARS_MAX or len(pattern.text) > PATTERN_LENGTH_MAX:
            raise self.wrong(
                pattern.column,
                f"the pattern has {stars} stars and {len(pattern.text)} characters",
                hint=f"use at most {STARS_MAX} and {PATTERN_LENGTH_MAX}",
            )
        self._count()
        return Like(key, pattern.text)

    def _value_or_range(self, key: Key) -> Condition:
        value = self._literal()
        first, dots, last = value.text.partition("..")
        if value.quoted or not dots:
            return self._equals(key, value)
        if not first or not last or ".." in last:
            raise self.wrong(value.column, f"{shown(value.text)} is not a range", hint="write 10..20, or use < and >")
        return self._range(
            key, _Literal(first, False, value.column), _Literal(last, False, value.column + len(first) + 2)
        )

    def _range(self, key: Key, first: _Literal, last: _Literal) -> Condition:
        return And((self._order(key, ">=", first), self._order(key, "<=", last)))

    def _equals(self, key: Key, value: _Literal) -> Condition:
        if key.type == "instant":
            return self._range(key, value, value)
        self._count()
        return Equals(key, _typed(key, value))

    def _order(self, key: Key, relation: Relation, value: _Literal) -> Order:
        self._count()
        if key.type == "instant":
            first, last = _instants(key, value)
            return Order(key, relation, first if relation in ("<", ">=") else last)
        bound = _typed(key, value)
        if isinstance(bound, bool):
            raise self.wrong(
                value.column, f"expected a number or a text, found {shown(value.text)}", hint="compare with ="
            )
        return Order(key, relation, bound)

    def _literal(self) -> _Literal:
        token = self._take()
        if token.kind == "quoted":
            return _Literal(_unquoted(token.text[1:-1], token.column), True, token.column)
        if token.kind != "word":
            self._expected(token, "a value")
        if '"' in token.text:
            raise self.wrong(token.column, "quotes enclose the whole value")
        return _Literal(token.text, False, token.column)


# --- what a value means -----------------------------------------------------------------------------------------------


def _typed(key: Key, value: _Literal) -> Value:
    """The value as the key's type has it, or InvalidExpression."""
    match key.type:
        case "any":
            return value.of_metadata()
        case "text":
            if key.path == ("kind",) and value.text not in KINDS:
                raise _expected_value(value, f"one of {', '.join(KINDS)}", KINDS)
            return value.text
        case "flag":
            if value.quoted or value.text.lower() not in ("true", "false"):
                raise _expected_value(value, "true or false")
            return value.text.lower() == "true"
        case "number":
            number = None if value.quoted else _as_size(value.text)
            if number is None:
                raise _expected_value(value, "a number, or a size such as 10GB")
            return number
    raise _expected_value(value, "a date")  # instants are ranges, never values


def _expected_value(value: _Literal, what: str, known: Sequence[str] = ()) -> InvalidExpression:
    close = difflib.get_close_matches(value.text[:64], known, n=1)
    hint = f"did you mean {close[0]}?" if close else ""
    return _Reader.wrong(value.column, f"expected {what}, found {shown(value.text)}", hint=hint)


def _as_number(text: str) -> int | float | None:
    if not _NUMBER.fullmatch(text) or not text.isascii():
        return None
    if re.fullmatch(r"[+-]?\d{1,19}", text) and -_INTEGER_MAX - 1 <= int(text) <= _INTEGER_MAX:
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else None


def _as_size(text: str) -> int | float | None:
    found = _SIZE.fullmatch(text)
    if found is None:
        return _as_number(text)
    unit: int = (1024 if found[3] else 1000) ** (" KMGTPE".index(found[2].upper()))
    return int(float(found[1]) * unit) if len(found[1]) < 16 else None


def _instants(key: Key, value: _Literal) -> tuple[int, int]:
    """The first and the last microsecond of the moment or day."""
    try:
        if _DATE.fullmatch(value.text):
            start = micros(datetime.combine(date.fromisoformat(value.text), time(), UTC))
            return start, start + timedelta(days=1) // _MICROSECOND - 1
        moment = datetime.fromisoformat(value.text)
    except ValueError:
        raise _expected_value(value, f"a date for {key}, such as 2026-03-01 or 2026-03-01T12:00:00Z") from None
    at = micros(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
    return at, at
