"""Performance markers: what a server says of a copy it makes, cut anywhere and ending anyhow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.storage.markers import Markers

TOLD = (
    b"Perf Marker\nTimestamp: 1\nStripe Index: 0\nStripe Bytes Transferred: 0\nTotal Stripe Count: 1\nEnd\n"
    b"Perf Marker\nTimestamp: 6\nStripe Index: 0\nStripe Bytes Transferred: 7\nTotal Stripe Count: 2\nEnd\n"
    b"Perf Marker\r\nTimestamp: 6\r\nStripe Index: 1\r\nStripe Bytes Transferred: 35\r\nEnd\r\n"
)


@given(cuts=st.lists(st.integers(0, len(TOLD) + 17)))
def test_the_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    markers, stream, begin = Markers(), TOLD + b"success: Created\n", 0
    for cut in [*sorted(cuts), len(stream)]:
        markers.feed(stream[begin:cut])
        begin = cut
    assert markers.bytes_done == 42
    assert markers.outcome().kind == "success"


@pytest.mark.parametrize(
    ("end", "kind", "text"),
    [
        (b"success: Created", "success", ""),
        (b"SUCCESS: Created\r\n\r\n", "success", ""),
        (b"failure: Transferred a partial file", "failure", "Transferred a partial file"),
        (b"failed: no\n", "failure", "no"),
        (b"aborted: by the operator", "failure", "by the operator"),
        (b"failure", "failure", "no reason given"),
        (b"failure: Authorization: Bearer abc.def was refused", "failure", "Authorization: Bearer … was refused"),
        (b"failure: https://h/p?authz=abc&x was refused", "failure", "https://h/p?authz=…&x was refused"),
        (b"", "unknown", None),
        (b"succ", "unknown", None),
        (b"successful so far", "unknown", None),
        (b"success: Created\nfailure: the disk is full", "failure", "the disk is full"),
        (b"success: Created\nPerf Marker\n", "unknown", None),
        (b"\xff\xfe\x00", "unknown", None),
    ],
)
def test_only_the_last_line_decides(end: bytes, kind: str, text: str | None) -> None:
    markers = Markers()
    markers.feed(TOLD + end)
    outcome = markers.outcome()
    assert outcome.kind == kind
    assert text is None or outcome.text == text


def test_a_stream_without_end_takes_no_memory() -> None:
    markers = Markers()
    for stripe in range(5_000):
        markers.feed(f"Stripe Index: {stripe}\nStripe Bytes Transferred: 1\n".encode())
    for _ in range(100):
        markers.feed(b"x" * 100_000)
    assert markers.bytes_done == 1_000
    assert len(markers._line) < 10_000
    markers.feed(b"\nfailure: " + b"y" * 100_000)
    assert len(markers.outcome().text) <= 300
