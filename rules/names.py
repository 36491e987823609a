"""Names people choose: read, check, print.

Given     text from a person, a file system or another system.
Returns   a Did, or the checked name of a scope, endpoint, site, account or activity.
Promises  one accepted text, one name: NFC, no control characters, no empty, '.' or '..' segment, bounded length, so
          a name can become a path without another look. Refusals quote at most 80 characters of what was given.
Partner   rules.paths turns a Did into a path; replica.wire carries a Did as its text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from rules.errors import Invalid

SEGMENT_BYTES_MAX = 255
NAME_BYTES_MAX = 1024

#: A scope is a path segment, hence no '/', and no leading dot or dash. One layout makes its dots slashes, hence no dot
#: after a dot or at the end, which would become an empty segment.
_SCOPE = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_\-]|\.(?=[A-Za-z0-9_\-]))*\Z")
#: Letters, digits, '_' and '-' as in endpoint expressions, where every other character has a meaning.
_WORD = re.compile(r"[A-Za-z0-9]+(?:[_\-][A-Za-z0-9]+)*\Z")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,63}\Z")
#: Names of which a look tells that nothing is wrong with them: most names, thousands at a time.
_PLAIN = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*(?:/[A-Za-z0-9_\-][A-Za-z0-9_.\-]*)*\Z")
#: The same with a scope without a dot.
_PLAIN_DID = re.compile(rf"([A-Za-z0-9_][A-Za-z0-9_\-]{{0,63}}):({_PLAIN.pattern})")
#: Unicode categories refused in names: control, surrogate, private use, unassigned, line and paragraph separators;
#: and format characters (right-to-left override, zero width), which make two different names look the same.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def shown(text: str) -> str:
    """A text as an error message may repeat it: quoted, escaped, at most 80 characters."""
    return ascii(text[:80]) + ("…" if len(text) > 80 else "")


class Did(NamedTuple):
    """A data identifier `scope:name`. Make one with `Did.parse` or `Did.of`, which check."""

    scope: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Did:
        """From `scope:name`; the first colon separates. Raises Invalid with the reason."""
        if len(text) <= SEGMENT_BYTES_MAX and (plain := _PLAIN_DID.match(text)):
            return cls(*plain.groups())
        scope, colon, name = text.partition(":")
        if not colon:
            raise Invalid(f"{shown(text)} is not a DID", hint="write it as scope:name", field="did")
        return cls.of(scope, name)

    @classmethod
    def of(cls, scope: str, name: str) -> Did:
        return cls(check_scope(scope), check_did_name(name))

    def __str__(self) -> str:
        return f"{self.scope}:{self.name}"


def check_did_name(name: str) -> str:
    """The name in NFC, or Invalid: which segment or character cannot be in a name, and what can."""
    if len(name) <= SEGMENT_BYTES_MAX and _PLAIN.match(name):
        return name

    def no(reason: str, hint: str) -> Invalid:
        return Invalid(f"the name {shown(name)} {reason}", hint=hint, field="did")

    if not name:
        raise Invalid("the name is empty", hint="write the DID as scope:name", field="did")
    if len(name) > NAME_BYTES_MAX:
        raise no(f"has {len(name)} characters", f"a name has at most {NAME_BYTES_MAX} bytes")
    for character in name:
        if unicodedata.category(character) in _REFUSED_CATEGORIES:
            raise no(
                f"holds the character U+{ord(character):04X}",
                "control, invisible and unassigned characters cannot be in a name",
            )
    name = unicodedata.normalize("NFC", name)
    if len(name.encode()) > NAME_BYTES_MAX:
        raise no(f"has {len(name.encode())} bytes", f"a name has at most {NAME_BYTES_MAX} bytes")
    if "\\" in name:
        raise no("holds a backslash", "separate folders by '/'")
    for segment in name.split("/"):
        if segment in ("", ".", ".."):
            what = {"": "an empty segment"}.get(segment, f"the segment {segment!r}")
            raise no(
                f"has {what}", "what stands between slashes is a real name: no '//', '.', '..', no slash at an end"
            )
        if len(segment.encode()) > SEGMENT_BYTES_MAX:
            raise no("has a segment that is too long", f"a segment has at most {SEGMENT_BYTES_MAX} bytes")
        if segment != segment.strip():
            raise no("has a segment that begins or ends with white space", "strip it: nobody would see it")
        if segment.startswith(".replica"):
            raise no("has a segment that begins with '.replica'", "such names are kept for Replica's own files")
    return name


def check_scope(scope: str) -> str:
    if not _SCOPE.match(scope):
        raise Invalid(
            f"{shown(scope)} is not a scope",
            hint="use 1 to 64 letters, digits, '_', '-' and single dots, beginning with a letter, digit or '_'",
            field="scope",
        )
    return scope


def check_word(word: str, what: str) -> str:
    """The name of a site, endpoint or account: letters and digits joined by single '_' or '-', at most 64."""
    if len(word) > 64 or not _WORD.match(word):
        raise Invalid(
            f"{shown(word)} is not a name for {what}",
            hint="use at most 64 letters and digits, joined by single '_' or '-'",
            field="name",
        )
    return word


def check_attribute_key(key: str) -> str:
    if not _KEY.match(key):
        raise Invalid(
            f"{shown(key)} is not an attribute's key",
            hint="use letters, digits, '.', '_' and '-', at most 64",
            field="attributes",
        )
    return key
