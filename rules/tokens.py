"""Words, quoted texts and signs: what expressions and conditions are read from, and the reader they share.

Given     a text, and of a language its tokens and what it says of a sign that means nothing to it.
Returns   a Reader that sees one token ahead; a subclass adds the grammar.
Promises  every refusal is an InvalidExpression with the column (from 1).
Partner   rules.expression_syntax and rules.conditions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, NoReturn, cast

from rules.errors import InvalidExpression
from rules.names import shown

_BLANK = re.compile(r"[ \t\r\n]*")


class Token(NamedTuple):
    kind: Literal["word", "quoted", "sign", "end"]
    text: str
    column: int

    def is_sign(self, *signs: str) -> bool:
        return self.kind == "sign" and self.text in signs

    def is_word(self, *words: str) -> bool:
        return self.kind == "word" and self.text.lower() in words

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else shown(self.text)


class Reader:
    """Recursive descent. `TOKEN` has the groups word, quoted and sign; `FIELD` is what errors are about."""

    TOKEN: ClassVar[re.Pattern[str]]
    QUOTES: ClassVar[str]
    MEANINGLESS: ClassVar[str]
    FIELD: ClassVar[str]

    def __init__(self, text: str) -> None:
        self._ahead = list(self._tokens(text))
        self._ahead.reverse()  # the next token is the last of the list

    @classmethod
    def wrong(cls, column: int, what: str, *, hint: str = "") -> InvalidExpression:
        return InvalidExpression(f"column {column}: {what}", column=column, hint=hint, field=cls.FIELD)

    @classmethod
    def _tokens(cls, text: str) -> Iterator[Token]:
        at = 0
        while True:
            blank = _BLANK.match(text, at)
            at = blank.end() if blank else at
            if at == len(text):
                yield Token("end", "", at + 1)
                return
            found = cls.TOKEN.match(text, at)
            if found is None:
                if text[at] in cls.QUOTES:
                    raise cls.wrong(at + 1, "the quote that opens here is never closed")
                raise cls.wrong(at + 1, f"{shown(text[at])} has no meaning here", hint=cls.MEANINGLESS)
            yield Token(cast('Literal["word", "quoted", "sign"]', found.lastgroup), found.group(), at + 1)
            at = found.end()

    @property
    def _next(self) -> Token:
        return self._ahead[-1]

    def _take(self) -> Token:
        # The end stays: whoever looks beyond it sees it again.
        return self._ahead[-1] if len(self._ahead) == 1 else self._ahead.pop()

    @classmethod
    def _expected(cls, token: Token, what: str, *, hint: str = "") -> NoReturn:
        raise cls.wrong(token.column, f"expected {what}, found {token}", hint=hint)


def quoted(text: str) -> str:
    """In double quotes, so that `unescaped` of what is between them is the text again."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def unescaped(text: str) -> str:
    """What a text between quotes means: a backslash stands for the character after it."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
