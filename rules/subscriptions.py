"""Which rules a subscription makes for a DID.

Given     a condition, templates of rules, and the facts about one DID, its metadata among them.
Returns   for each template the wish with its placeholders filled, or why it cannot be filled; nothing where the
          condition does not hold.
Promises  a wish is filled whole or not at all; what metadata say can choose a value, never change the expression
          around it. A template that could never be read is refused when it is made, with the column.
Partner   rules.conditions reads and decides conditions; replica.catalog.subscriptions gathers the facts.

In an expression `{metadata.key}` stands for a text, a number, true or false of the DID's metadata; `{metadata.a.b}`
for what is deeper. `site={metadata.facility}` becomes `site=DESY`, or `site="KIT Tier 1"`, with the quotes it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rules import conditions, expression_syntax
from rules.errors import InvalidExpression
from rules.names import shown

_PART = re.compile(r'(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<placeholder>\{[^{}]*\})', re.DOTALL)
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_BARE = re.compile(r"[A-Za-z0-9._-]+")
_PREFIX = "metadata."


@dataclass(frozen=True, slots=True)
class Template:
    """Of a subscription's rule, what the decision needs. Its number is never given to another one."""

    number: int
    expression: str
    source_expression: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    number: int
    expression: str
    source_expression: str | None


@dataclass(frozen=True, slots=True)
class Lacking:
    """A rule that should be and cannot."""

    number: int
    reason: str
    hint: str


class _Unfilled(Exception):
    pass


def decide(
    condition: conditions.Condition, templates: Sequence[Template], facts: Mapping[str, Any]
) -> list[Wish | Lacking]:
    """One answer for each template, or none at all."""
    if not conditions.matches(condition, facts):
        return []
    return [_filled(template, facts.get("metadata") or {}) for template in templates]


def check(text: str, field: str) -> bool:
    """Refuse what no metadata can make an expression; True when it has placeholders."""
    # Digits are a name, a value and a number; as many as there were characters, so that columns stay true.
    expression_syntax.parse(_replaced(text, lambda key, placeholder: "1" * len(placeholder), field))
    return any(found["placeholder"] or _PLACEHOLDER.search(found["quoted"] or "") for found in _PART.finditer(text))


def _filled(template: Template, metadata: Mapping[str, Any]) -> Wish | Lacking:
    def value(key: conditions.Key, placeholder: str) -> str:
        found: Any = metadata
        for segment in key.path:
            found = found.get(segment) if isinstance(found, Mapping) else None
        if found is None or found == "":
            raise _Unfilled(f"the metadata have no {key}")
        if not isinstance(found, str | int | float):
            raise _Unfilled(f"{key} is not one text or number")
        return str(found).lower() if isinstance(found, bool) else str(found)

    try:
        expression = _replaced(template.expression, value, "expression")
        source = template.source_expression
        if source is not None:
            source = _replaced(source, value, "source_expression")
        expression_syntax.parse(expression)
        if source is not None:
            expression_syntax.parse(source)
    except _Unfilled as why:
        return Lacking(template.number, str(why), "set it with `replica did meta`, and the rule is made")
    except InvalidExpression as error:
        return Lacking(template.number, f"{shown(expression)}: {error.message}", error.hint)
    return Wish(template.number, expression, source)


def _replaced(text: str, value: Callable[[conditions.Key, str], str], field: str) -> str:
    """`text` with its placeholders filled, each so that it stays one value."""

    def bare(found: re.Match[str]) -> str:
        if found["placeholder"] is None:
            return _PLACEHOLDER.sub(inside, found["quoted"])
        given = value(_key(found.group(), found.start() + 1, field), found.group())
        return given if _BARE.fullmatch(given) else f'"{_escaped(given)}"'

    def inside(found: re.Match[str]) -> str:
        return _escaped(value(_key(found.group(), found.start() + 1, field), found.group()))

    return _PART.sub(bare, text)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _key(placeholder: str, column: int, field: str) -> conditions.Key:
    text = placeholder[1:-1].strip()
    if not text.startswith(_PREFIX):
        raise InvalidExpression(
            f"column {column}: {shown(placeholder)} stands for nothing",
            column=column,
            hint="write {metadata.key} for what the DID's metadata say",
            field=field,
        )
    try:
        return conditions.parse_key(text)
    except InvalidExpression as error:
        raise InvalidExpression(
            f"column {column}: {shown(placeholder)} is no key of metadata", column=column, hint=error.hint, field=field
        ) from None
