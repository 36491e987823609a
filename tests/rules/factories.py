"""Endpoints, units and wishes for tests, with everything that does not matter filled in."""

from __future__ import annotations

from types import MappingProxyType

from hypothesis import strategies as st

from rules.endpoints import AttributeValue, Endpoint
from rules.names import Did
from rules.states import EndpointKind

TB = 10**12


def endpoint(
    name: str,
    id: int | None = None,
    *,
    site: str = "HZDR",
    kind: EndpointKind = EndpointKind.DISK,
    readable: bool = True,
    writable: bool = True,
    free_bytes: int | None = None,
    **attributes: AttributeValue,
) -> Endpoint:
    """An endpoint; without an `id` it is made of the name, the same each time."""
    return Endpoint(
        id=sum(ord(c) * 257**i for i, c in enumerate(name)) % 2**31 if id is None else id,
        name=name,
        site=site,
        kind=kind,
        attributes=MappingProxyType(attributes),
        readable=readable,
        writable=writable,
        free_bytes=free_bytes,
    )


def names(endpoints: tuple[Endpoint, ...]) -> list[str]:
    return [e.name for e in endpoints]


#: Texts that have hurt other systems as the scope or the name of a file.
HOSTILE_NAMES = [
    *["", ".", "..", "...", "a/../b", "a/./b", "a//b", "/a", "a/", "//srv/x", "~", "~root", "-rf", "--help", "a b"],
    *[
        " a",
        "a ",
        ".a",
        "a.",
        "a\n",
        "a\r\nSet-Cookie: x=1",
        "a\0b",
        "a\t",
        "\x1b[2J",
        "a:b:c",
        ":",
        "a%2Fb",
        "a%252Fb",
    ],
    *["%2e%2e%2f", "..%c0%af", "%ff", "%00", "a\\b", "..\\..\\x", "C:\\x", "CON", "NUL.txt", "a;b", "$(id)", "`id`"],
    *["|id", "&", "*", "?", "[a]", "{a,b}", "'", '"', "'--", "');DROP TABLE x;--", "%", "_", "<svg onload=alert(1)>"],
    *['"><img src=x onerror=alert(1)>', "javascript:alert(1)", "{{7*7}}", "${7*7}", "%s%n", "{0.__class__}", "=1+1"],
    *["@SUM(1)", "+cmd", "\u00e9", "e\u0301", "\ufb01", "\uff0e\uff0e\uff0f", "a\u202eb", "a\u200bb", "a\u2028b"],
    *["\ufeffa", "\ud800", "a\udfff", "\U0001f469\u200d\U0001f680", "\u0130", "\u00df", "SS", "\u0430", "x" * 255],
    *["x" * 256, "x" * 1024, "x" * 1025, "x" * 65536, "\U00010348" * 255, "/".join("x" * 1000), "/".join(["x"] * 513)],
    *["A", "a", "a.part", ".trash", ".rse-sentinel", ".replica", ".replica-x/y", "__proto__", "constructor", "None"],
    *["null", "true", "NaN", "0x10", "1e309", "a/.replica.tmp", "a/ b", "user.", "user..x", "group.a..b", "user.."],
]

#: Any text at all, with the hostile ones drawn often.
hostile_texts = st.one_of(
    st.sampled_from(HOSTILE_NAMES),
    st.text(max_size=40),
    st.lists(st.sampled_from([*HOSTILE_NAMES[:40], "a", "b.c", "/", ":", "é"]), max_size=6).map("/".join),
)
#: Scopes and names that are allowed.
scopes = st.from_regex(r"(user|group|users|mc|p)?[a-z0-9_](\.?[a-z0-9_\-]){0,10}", fullmatch=True)
_segments = st.text("abcZ019_-.é ", min_size=1, max_size=8).map(str.strip).filter(lambda s: s not in ("", ".", ".."))
did_names = st.lists(_segments, min_size=1, max_size=4).map("/".join)
dids = st.builds(Did.of, scopes, did_names)
