"""Which endpoints an expression selects.

Given     an expression (text or tree) and one snapshot of all endpoints.
Returns   the selected endpoints, by name.
Promises  the result depends on the snapshot only, so a changed attribute counts at once. A name that nothing bears is
          InvalidExpression; an expression that selects nothing is Refused, and says which part of it became empty.
Partner   rules.expression_syntax has the grammar; rules.placement takes the result as candidates.

    NAME            the endpoint of that name, and every endpoint where the attribute NAME is true
    key=value       the attribute, printed, is the value: case counts, `tier=1` is the number 1, booleans are true/false
    key!=value      every endpoint that `key=value` does not select, also those without the attribute
    key<n  key>=n   numeric; an endpoint whose attribute is no number, or is not there, is not selected
    key in (a, b)   `key=a` or `key=b`

Built-in keys are `name`, `site`, `kind` (disk, tape) and `free_bytes`; every other key is an attribute (`country`,
`tier`, …). Use `tag=true`, not `tag`, for a tag that at times no endpoint has: it selects nothing instead of failing.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import assert_never

from rules.endpoints import BUILT_IN_KEYS, AttributeValue, Endpoint, attribute_text
from rules.errors import Broken, InvalidExpression, Refused
from rules.expression_syntax import Chain, Comparison, Everything, Expression, Leaf, Name, OneOf, leaves, number, parse

__all__ = ["Chain", "Comparison", "Everything", "Expression", "Leaf", "Name", "OneOf", "parse", "select"]

Selection = frozenset[int]

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


def select(expression: Expression | str, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The endpoints an expression selects, sorted by name. Give it all endpoints: names are checked against them."""
    tree = parse(expression) if isinstance(expression, str) else expression
    snapshot = _Snapshot(endpoints)
    snapshot.check_names(tree)
    chosen = snapshot.evaluate(tree)
    if not chosen:
        reason, hint = snapshot.why_empty(tree)
        raise Refused(f"`{_cut(tree)}` selects no endpoint: {reason}", hint=hint, field="expression")
    return tuple(e for e in snapshot.endpoints if e.id in chosen)


def _cut(tree: Expression) -> str:
    text = str(tree)
    return text if len(text) <= 80 else text[:79] + "…"


class _Snapshot:
    """All endpoints at one moment; each different leaf is evaluated once."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = tuple(sorted(endpoints, key=lambda e: (e.name, e.id)))
        self._known: dict[Leaf, Selection] = {}

    def evaluate(self, tree: Expression) -> Selection:
        if not isinstance(tree, Chain):
            return self._evaluate_leaf(tree)
        result = self.evaluate(tree.first)
        for sign, term in tree.rest:
            result = _joined(result, sign, self.evaluate(term))
        return result

    def _evaluate_leaf(self, leaf: Leaf) -> Selection:
        if leaf not in self._known:
            self._known[leaf] = frozenset(e.id for e in self.endpoints if _holds(leaf, e))
        return self._known[leaf]

    def check_names(self, tree: Expression) -> None:
        """Raises InvalidExpression for the first name that is neither an endpoint nor an attribute of any."""
        known = {e.name for e in self.endpoints} | self._keys()
        for leaf in leaves(tree):
            if isinstance(leaf, Name) and leaf.name not in known:
                raise InvalidExpression(
                    f"column {leaf.column}: there is no endpoint and no attribute `{_cut(leaf)}`",
                    column=leaf.column,
                    hint=_suggestion(leaf.name, known),
                )

    def _keys(self) -> set[str]:
        return set(BUILT_IN_KEYS).union(*(e.attributes for e in self.endpoints))

    def why_empty(self, tree: Expression) -> tuple[str, str]:
        """For a tree that selects nothing: the part where the last endpoint went, and a hint (may be empty)."""
        if not isinstance(tree, Chain):
            return self._why_leaf_empty(tree)
        # Of all the steps only one matters: the last that took away what was still there. Before the first term
        # there is nothing, and it has the say when nothing was ever there.
        result = self.evaluate(tree.first)
        reason = None if result else self.why_empty(tree.first)
        for at, (sign, term) in enumerate(tree.rest):
            right = self.evaluate(term)
            before, result = result, _joined(result, sign, right)
            if not before or result:
                continue
            if sign == "&" and not right:
                reason = self.why_empty(term)
            else:
                left = Chain(tree.first, tree.rest[:at]) if at else tree.first
                verb = "is also in" if sign == "&" else "is left without"
                reason = (f"`{_cut(left)}` selects {len(before)}, of which none {verb} `{_cut(term)}`", "")
        if reason is None:
            raise Broken(f"`{_cut(tree)}` selects something and was taken for empty")
        return reason

    def _why_leaf_empty(self, leaf: Leaf) -> tuple[str, str]:
        if not self.endpoints:
            return "there are no endpoints yet", "register one"
        match leaf:
            case Comparison(key=key) | OneOf(key=key) if all(e.value(key) is None for e in self.endpoints):
                return f"no endpoint has the attribute `{key[:80]}`", _suggestion(key, self._keys())
            case Name():
                return f"`{_cut(leaf)}` is not true at any endpoint", ""
            case _:
                return f"no endpoint has `{_cut(leaf)}`", ""


def _joined(left: Selection, sign: str, right: Selection) -> Selection:
    match sign:
        case "|":
            return left | right
        case "&":
            return left & right
        case _:
            return left - right


def _holds(leaf: Leaf, endpoint: Endpoint) -> bool:
    match leaf:
        case Everything():
            return True
        case Name(name=name):
            return name == endpoint.name or _is(endpoint.value(name), "true")
        case Comparison(key=key, relation="=", value=value):
            return _is(endpoint.value(key), value)
        case Comparison(key=key, relation="!=", value=value):
            return not _is(endpoint.value(key), value)
        case Comparison(key=key, relation=relation, value=value):
            return _compares(endpoint.value(key), relation, value)
        case OneOf(key=key, values=values):
            found = endpoint.value(key)
            return any(_is(found, value) for value in values)
    assert_never(leaf)


def _is(found: AttributeValue | None, value: str) -> bool:
    return found is not None and attribute_text(found) == attribute_text(value)


def _compares(found: AttributeValue | None, relation: str, value: str) -> bool:
    left = None if found is None else number(_number_text(found))
    right = number(value)
    return left is not None and right is not None and _COMPARE[relation](left, right)


def _number_text(found: AttributeValue) -> str:
    # A true tag counts as 1 in Rucio's comparisons, a false one as 0; in either spelling.
    return {"true": "1", "false": "0"}.get(attribute_text(found), attribute_text(found))


def _suggestion(name: str, known: Iterable[str]) -> str:
    by_lower = {k.lower(): k for k in sorted(known)}
    close = difflib.get_close_matches(name[:64].lower(), by_lower, n=1)
    return f"did you mean `{by_lower[close[0]]}`?" if close else ""
