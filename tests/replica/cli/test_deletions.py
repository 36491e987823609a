"""`replica deletion` as a person types it."""

from __future__ import annotations

from replica import wire


def test_ask_list_show_and_undo(w, typed):
    with w.service.client() as client:
        endpoints = sorted(e.name for e in client.endpoints.list())[:2]
        scope = next(client.scopes.list()).name
        for name in endpoints:
            file = wire.NewReplica(did=f"{scope}:twice", size=5, checksums={"xxh3_128": "f" * 32})
            client.replicas.register(wire.Registration(endpoint=name, replicas=[file], evidence="hashed"))
    did = f"{scope}:twice"
    assert "there are no such deletions" in typed("deletion", "list").stderr
    asked = typed.json("deletion", "ask", did, "--endpoint", endpoints[0])
    assert (asked["did"], asked["endpoint"], asked["state"], asked["why"]) == (did, endpoints[0], "queued", "asked")
    assert "no other good copy" in typed.error("deletion", "ask", did, "-e", endpoints[1], code=1)
    assert [d["id"] for d in typed.json("deletion", "list", "--state", "queued", "--did", did)] == [asked["id"]]
    assert "queued" in typed("deletion", "show", str(asked["id"])).stdout
    assert [d["state"] for d in typed.json("deletion", "undo", str(asked["id"]))] == ["undone"]
    assert "has ended" in typed.error("deletion", "undo", str(asked["id"]), code=1)
    assert "no deletion 99" in typed.error("deletion", "show", "99", code=3)
    assert typed.json("deletion", "ask", did, "-e", endpoints[1], "--last-copy")["why"] == "asked_last"
