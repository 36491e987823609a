"""`replica locate --metalink`, and the same document over REST."""

import xml.etree.ElementTree as ElementTree

from replica import wire
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World

NS = "{urn:ietf:params:xml:ns:metalink}"
ODD = "<a> & \"b\"/50% 'ü'.h5"


def read(document: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(document)
    assert root.tag == f"{NS}metalink"
    return {file.attrib["name"]: file for file in root}


def uploaded(w: World, typed: Typed) -> None:
    source = w.write({"a.h5": b"alpha", ODD: b"odd"})
    for endpoint in ("DESY-DISK", "HZDR-DISK"):
        typed("upload", source, "--scope", "p1", "--dataset", "raw", "--endpoint", endpoint)
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(attributes={"country": "DE"}, readable=False))
    w.client.endpoints.change("HZDR-DISK", wire.EndpointChange(attributes={"country": "<evil>"}))


def test_a_dataset_as_a_metalink_document(w: World, typed: Typed):
    uploaded(w, typed)
    files = read(typed("locate", "p1:raw", "--metalink").stdout)
    assert set(files) == {"a.h5", ODD}
    (known,) = [r for r in w.client.replicas.locate("p1:" + ODD) if r.endpoint == "DESY-DISK"]
    odd = files[ODD]
    assert odd.findtext(f"{NS}identity") == f"p1:{ODD}"
    assert odd.findtext(f"{NS}size") == "3"
    assert {h.attrib["type"]: h.text for h in odd.findall(f"{NS}hash")} == known.checksums
    urls = [(u.attrib.get("location"), u.attrib["priority"], u.text) for u in odd.findall(f"{NS}url")]
    # What cannot be read now comes last; what is no country is left out.
    assert [(where, priority) for where, priority, _ in urls] == [(None, "1"), ("de", "2")]
    assert urls[1][2] == known.url


def test_the_server_answers_with_the_same_document(w: World, typed: Typed):
    uploaded(w, typed)
    accept = {"Accept": "application/metalink4+xml"}
    answer = w.service.ask("GET", "/api/v1/dids/p1/raw/replicas", headers=accept)
    assert (answer.status, answer.headers.get_content_type()) == (200, "application/metalink4+xml")
    assert answer.body.decode() == typed("locate", "p1:raw", "--metalink").stdout
    assert w.service.ask("GET", "/api/v1/dids/p1/nothing/replicas", headers=accept).status == 404
    assert w.service.ask("GET", "/api/v1/dids/p1/raw/replicas", headers=accept, token=None).status == 401
    w.client.dids.add(wire.NewDid(did="p1:empty"))
    assert read(w.service.ask("GET", "/api/v1/dids/p1/empty/replicas", headers=accept).body.decode()) == {}


def test_signing_goes_with_a_document_only(typed: Typed):
    typed("locate", "p1:raw", "--presigned", "1h", code=2)
