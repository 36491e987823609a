"""An endpoint as the decisions see it.

Given     rows of the catalogue, gathered by replica.catalog.endpoints.
Returns   frozen values that rules.expressions, rules.placement and rules.sources read.
Promises  nothing here changes; a newer fact is a newer value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from rules.states import EndpointKind

#: What an attribute can be: a tag that is simply there is True.
AttributeValue = str | int | float | bool

#: Keys that every endpoint has; an attribute of the same name is not seen.
BUILT_IN_KEYS = ("name", "site", "kind", "free_bytes")


def attribute_text(value: AttributeValue) -> str:
    """An attribute as expressions and failure domains compare it: 1 is `1`, True and "True" are `true`."""
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place that stores. `free_bytes` already leaves out what is reserved for copies on their way."""

    id: int
    name: str
    site: str
    kind: EndpointKind
    attributes: Mapping[str, AttributeValue] = field(default_factory=lambda: MappingProxyType({}))
    readable: bool = True
    writable: bool = True
    deletable: bool = True
    #: None: not known, taken as unlimited.
    free_bytes: int | None = None
    #: Nothing new goes there, and what is there is brought elsewhere.
    draining: bool = False
    #: Out of service for good: no rule may use it.
    decommissioned: bool = False
    #: What a person said of why it cannot be used as usual; may be empty.
    status: str = ""

    def value(self, key: str) -> AttributeValue | None:
        """A built-in key or an attribute; its own name is an attribute that is true, as in Rucio."""
        match key:
            case "name":
                return self.name
            case "site":
                return self.site
            case "kind":
                return self.kind.label
            case "free_bytes":
                return self.free_bytes
        if key == self.name:
            return True
        return self.attributes.get(key)


@dataclass(frozen=True, slots=True)
class Link:
    """A directed way between two endpoints; no row means: allowed, at distance 1."""

    source_id: int
    target_id: int
    distance: int = 1
    allowed: bool = True


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why an endpoint cannot serve; `endpoint_id` None: why the endpoints together cannot."""

    endpoint_id: int | None
    code: str  #: for programs, and for counting
    message: str  #: for people; names the endpoint
