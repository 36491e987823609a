"""DIDs over REST and through the client: searched, given metadata, deleted and had back."""

from __future__ import annotations

import pytest

from replica import wire
from replica.client import Client
from rules.errors import InvalidExpression, NotFound, Refused
from tests.service import Service


@pytest.fixture
def client(service_on_both: Service) -> Client:
    client = service_on_both.client()
    client.scopes.add("p")
    for i in range(5):
        client.dids.add(wire.NewDid(did=f"p:d{i}", metadata={"run": i, "type": "raw" if i % 2 else "cooked"}))
    client.dids.add(wire.NewDid(did="p:c", kind="container", monotonic=True, lifetime_seconds=3600))
    return client


def test_a_scope_is_shown(client: Client) -> None:
    assert client.scopes.show("p").account == "root"
    with pytest.raises(NotFound, match="no scope q"):
        client.scopes.show("q")


def test_dids_are_found_by_a_condition_in_any_scope_and_order(client: Client) -> None:
    client.scopes.add("q")
    client.dids.add(wire.NewDid(did="q:d9", metadata={"run": 9, "type": "raw"}))
    assert [d.did for d in client.dids.list(where="type = raw", sort="-run")] == ["q:d9", "p:d3", "p:d1"]
    assert [d.did for d in client.dids.list("p", where="run in 2..9 and kind = dataset")] == ["p:d2", "p:d3", "p:d4"]
    assert [d.did for d in client.dids.list(kind="container")] == ["p:c"]
    with pytest.raises(InvalidExpression) as refusal:
        list(client.dids.list(where="run = "))
    assert (refusal.value.column, refusal.value.field) == (7, "where")


def test_pages_of_a_sorted_list_go_on(client: Client, service_on_both: Service) -> None:
    seen, cursor = [], ""
    while True:
        page = service_on_both.ask("GET", f"/api/v1/dids?sort=-run&limit=2{cursor}").json
        seen += [item["did"] for item in page["items"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert seen == ["p:d4", "p:d3", "p:d2", "p:d1", "p:d0", "p:c"]


def test_metadata_are_changed_one_by_one_and_in_bulk(client: Client) -> None:
    change = wire.MetadataChange(set={"proposal.end": "2026-06-30", "run": None}, unset=["type"])
    assert client.dids.change_metadata("p:d0", change).metadata == {"proposal": {"end": "2026-06-30"}, "run": None}
    assert client.dids.metadata("p:d0").did == "p:d0"
    many = (wire.MetadataOf(did=f"p:d{i}", set={"done": True}) for i in range(5))
    assert client.dids.change_metadata_of_many(many).changed == 5
    assert len(list(client.dids.list(where="done = true"))) == 5


def test_a_did_is_changed_deleted_and_had_back(client: Client, service_on_both: Service) -> None:
    shown = client.dids.show("p:c")
    assert shown.monotonic and shown.expires_at is not None
    assert client.dids.change("p:c", wire.DidChange(lifetime_seconds=None)).expires_at is None
    with pytest.raises(Refused, match="monotonic"):
        client.dids.change("p:c", wire.DidChange(monotonic=False))
    assert client.dids.delete(["p:d0", "p:d1"]).deleted == 2
    assert service_on_both.ask("DELETE", "/api/v1/dids/p/d2").json["deleted"] == 1
    assert sorted(d.did for d in client.dids.list(deleted=True)) == ["p:d0", "p:d1", "p:d2"]
    with pytest.raises(NotFound) as refusal:
        client.dids.show("p:d0")
    assert "replica did undelete p:d0" in refusal.value.hint
    gone = client.dids.show("p:d0", deleted=True)
    assert gone.deleted_at is not None and gone.final_at is not None and (gone.final_at - gone.deleted_at).days == 7
    assert client.dids.undelete(["p:d0", "p:d1"]).undeleted == 2
    assert [(h.kind, h.account) for h in client.dids.history("p:d0")] == [
        ("did.created", "root"),
        ("did.deleted", "root"),
        ("did.undeleted", "root"),
    ]


def test_several_parents_are_filled_in_one_call(client: Client) -> None:
    client.dids.add(wire.NewDid(did="p:c2", kind="container"))
    both = [
        wire.Attaching(parent="p:c", children=["p:d0", "p:d1"]),
        wire.Attaching(parent="p:c2", children=["p:c"]),
    ]
    assert client.dids.attach_all(both).attached == 3
    assert [child.did for child in client.dids.contents("p:c2")] == ["p:c"]
    with pytest.raises(NotFound, match="no DID p:none"):
        client.dids.attach_all(
            [wire.Attaching(parent="p:c", children=["p:d2"]), wire.Attaching(parent="p:none", children=["p:d2"])]
        )
    assert len(list(client.dids.contents("p:c"))) == 2
