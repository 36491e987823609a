"""What the catalogue knows against what is listed: bytes of names, parts, and what a kill leaves behind."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from replica.client.listings import entries
from replica.storage.base import Entry
from replica.storage.comparing import NO_SIZE, Comparison, Dark, Missing, own_folder
from rules.errors import Busy, Invalid, Refused

PATHS = ["a", "a/b", "ü", "u\u0308", "new\nline", "tab\t\x01one", "x" * 4000, 'quote"', "é"]


def compared(folder: Path, known: dict[str, int], listed: list[Entry]) -> tuple[set[object], set[object]]:
    comparison = Comparison(folder)
    for number, (path, size) in enumerate(known.items(), 1):
        comparison.know(number, 3, size, True, path)
    comparison.known.finish()
    comparison.list_all(listed)
    comparison.listed.finish()
    found = list(comparison.differences())
    assert len(found) == len(set(found))
    comparison.remove()
    assert not folder.exists()
    return {f for f in found if isinstance(f, Missing)}, {f for f in found if isinstance(f, Dark)}


def test_names_are_compared_byte_by_byte(tmp_path: Path) -> None:
    known = dict.fromkeys(PATHS, 5)
    assert compared(tmp_path / "c", known, [Entry(path, 5, 1) for path in PATHS]) == (set(), set())
    others = [Entry(path + ".", 7, 9) for path in PATHS]
    missing, dark = compared(tmp_path / "c", known, others)
    assert {m.file for m in missing} == set(range(1, len(PATHS) + 1))  # type: ignore[attr-defined]
    assert dark == {Dark(path + ".", 7, 9, "") for path in PATHS}


def test_sizes_and_what_is_not_expected(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "c")
    for number, (path, expected) in enumerate({"same": 1, "other": 1, "unsaid": 1, "copying": 0, "gone": 0}.items()):
        comparison.know(number, 1, 5, bool(expected), path)
    comparison.known.finish()
    sizes = {"same": 5, "other": 6, "unsaid": NO_SIZE, "copying": 2, "dark": NO_SIZE}
    comparison.list_all(Entry(path, size, 0) for path, size in sizes.items())
    comparison.list_all([Entry("same", 5, 0, "symbolic link")])
    comparison.know(0, 1, 5, True, "same")  # said twice
    comparison.known.write()
    comparison.listed.finish()
    assert set(comparison.differences()) == {
        Missing(1, 1, 6), Dark("dark", 0, 0, ""), Dark("same", 5, 0, "symbolic link")
    }  # fmt: skip
    comparison.remove()


def test_who_comes_after_a_kill_goes_on_with_what_is_complete(tmp_path: Path) -> None:
    first = Comparison(tmp_path / "c")
    first.know(1, 1, 5, True, "a")
    first.known.finish()
    first.list_all([Entry("b", 1, 1)])
    first.listed.write()
    with pytest.raises(Busy):
        Comparison(tmp_path / "c")  # it may only seem to be dead
    first.close()
    second = Comparison(tmp_path / "c")
    assert (second.known.complete, second.known.totals.files) == (True, 1)
    assert (second.listed.complete, second.listed.totals.files) == (False, 0)
    second.list_all([Entry("a", 5, 1)])
    second.listed.finish()
    assert list(second.differences()) == []
    second.close()
    # A power cut may leave the mark and not what it speaks of.
    part = next(path for path in (tmp_path / "c").glob("listed.??") if path.stat().st_size)
    os.truncate(part, 1)
    third = Comparison(tmp_path / "c")
    assert (third.known.complete, third.listed.complete) == (True, False)
    third.remove()


def test_nobody_else_plants_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    os.symlink(tmp_path / "open", tmp_path / "link")
    for name in ("open", "link"):
        with pytest.raises(Refused):
            own_folder(tmp_path / name)
    assert own_folder(tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_listing_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = (
        b'path,size,checksum\n./a/b,5,adler32:1\n"c,d",7\r\ne\n"f ""g""",0,\n.replica/endpoint,3\nbad\xff,1\n"x\ny",2\n'
    )
    expected = [
        *(Entry("a/b", 5, 0), Entry("c,d", 7, 0), Entry("e", NO_SIZE, 0), Entry('f "g"', 0, 0)),
        *(Entry("bad\\xff", 1, 0, "name is not UTF-8"), Entry("x\ny", 2, 0)),
    ]
    for name, content in (("plain", text), ("packed", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
        assert list(entries(tmp_path / name)) == expected


@pytest.mark.parametrize("line", [b"/absolute,1", b"a/../b,1", b"a,b,c,d", b"a,much", b"a,-1", b",1", b"x" * 5_000])
def test_a_line_that_cannot_be_right_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "listing").write_bytes(b"good,1\n" + line + b"\n")
    with pytest.raises(Invalid, match="line 2"):
        list(entries(tmp_path / "listing"))


def test_a_listing_that_was_cut_off_is_none(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"f%d,1\n" % i for i in range(10_000)))
    (tmp_path / "listing").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(Invalid):
        list(entries(tmp_path / "listing"))
