"""Where a name lies at an endpoint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.errors import Invalid
from rules.names import Did
from rules.paths import DEFAULT_LAYOUT, LAYOUTS, path_for
from tests.rules.factories import dids, hostile_texts

layouts = st.sampled_from(sorted(LAYOUTS))


@pytest.mark.parametrize(
    ("did", "path"),
    [
        # The first two are what Rucio's own tests expect of its layout; the others follow from its rule.
        ("foo:bar", "foo/4e/99/bar"),
        ("user.foo:bar", "user/foo/13/7f/bar"),
        ("mc.x:bar", "mc.x/6e/99/bar"),
        ("group.phys.top:d/f.root", "group/phys/top/5e/e3/d/f.root"),
        ("users.x:n", "users/x/36/9a/n"),
    ],
)
def test_hash_is_the_layout_of_rucio(did: str, path: str) -> None:
    assert path_for(Did.parse(did), "hash") == path


def test_identity_keeps_the_name_readable() -> None:
    assert DEFAULT_LAYOUT == "identity"
    assert path_for(Did.parse("user.foo:run1/é.h5"), "identity") == "user.foo/run1/é.h5"


def test_an_unknown_layout_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(Invalid) as told:
        path_for(Did("a", "b"), "xenon\n")
    assert "hash" in told.value.hint
    assert "identity" in told.value.hint


@given(st.sets(dids, min_size=2, max_size=12))
def test_two_dids_never_share_a_path_in_identity(some: set[Did]) -> None:
    assert len({path_for(did, "identity") for did in some}) == len(some)


@given(st.sets(dids, min_size=2, max_size=12))
def test_two_dids_never_share_a_path_in_hash_outside_of_user_and_group_scopes(some: set[Did]) -> None:
    some = {did for did in some if not did.scope.startswith(("user", "group"))}
    assert len({path_for(did, "hash") for did in some}) == len(some)


def test_the_documented_collision_of_hash_is_real() -> None:
    one, other = Did.parse("user.08:n559"), Did.parse("user:6d/n559")
    assert path_for(one, "hash") == path_for(other, "hash") == "user/08/0e/6d/n559"


@given(hostile_texts, hostile_texts, layouts)
def test_a_checked_did_has_a_path_below_the_root_in_every_layout(scope: str, name: str, layout: str) -> None:
    try:
        did = Did.of(scope, name)
    except Invalid:
        return
    assert _is_below_the_root(path_for(did, layout))


@given(hostile_texts, hostile_texts, layouts)
def test_a_did_that_nobody_checked_has_a_path_below_the_root_or_none(scope: str, name: str, layout: str) -> None:
    try:
        path = path_for(Did(scope, name), layout)
    except Invalid:
        return
    assert _is_below_the_root(path)


def _is_below_the_root(path: str) -> bool:
    return all(segment not in ("", ".", "..") for segment in path.split("/"))
