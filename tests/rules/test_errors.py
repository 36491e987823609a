"""The error tree: every class can be told apart, has words, and stands where decisions look for it."""

from __future__ import annotations

import pytest

from rules import errors
from rules.errors import Busy, InvalidExpression, Permanent, ReplicaError, StorageError, Transient

CLASSES = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ReplicaError)]


def test_no_two_classes_share_a_code() -> None:
    assert len({e.code for e in CLASSES}) == len(CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__
    assert all(e.__name__ in errors.__doc__ for e in CLASSES)


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_without_a_message_says_what_its_class_means(error: type[ReplicaError]) -> None:
    assert error().message == (error.__doc__ or "").strip()
    assert str(error("this", hint="that")) == "this"


def test_a_storage_error_is_either_transient_or_permanent() -> None:
    ends = [e for e in CLASSES if issubclass(e, StorageError) and not e.__subclasses__()]
    assert all(issubclass(e, Transient) != issubclass(e, Permanent) for e in ends)


def test_details_travel_with_the_error() -> None:
    assert InvalidExpression("no", column=7).column == 7
    assert Busy("later", endpoint="A", path="x", side="target").side == "target"
    assert Busy().retry_after_seconds is None
