"""Archives with forged headers are refused: torch.load(mmap=True) believes what the pickle and the headers say."""

import struct
import zlib

import pytest
import torch
from weight_files import assert_refused, save

HEADER, RECORD = b"PK\3\4", b"PK\1\2"  # of a part, and in the directory


def entry(content, name, signature):
    """Where the header or record of an archive's part begins."""
    distance, start = {HEADER: 30, RECORD: 46}[signature], content.index(signature)
    while content[start + distance : start + distance + len(name)] != name:
        start = content.index(signature, start + 1)
    return start


def lengthen_in_the_pickle(content):
    """The pickle says 100 values; the part has 6. Its checksum fits."""
    start = content.index(b"K\x06t")
    assert content.count(b"K\x06t") == 1
    content[start + 1] = 100
    pickled = zlib.crc32(content[content.index(b"\x80\x02}") : content.index(b"PK\7\x08", start)])
    at = entry(content, b"w/data.pkl", RECORD) + 16
    content[at : at + 4] = pickled.to_bytes(4, "little")


# in the record or header of the first storage: place, bytes, and the number there, from the old one and the file
FORGED = {
    "longer in the pickle": [],
    "longer in the directory": [(RECORD, at, 4, lambda *_: 100) for at in (20, 24)],
    "longer in the pickle, and beyond the file": [(RECORD, at, 4, lambda *_: 400) for at in (20, 24)],
    "beyond the file": [(RECORD, 42, 4, lambda *_: 2**31)],
    "on another part": [(RECORD, 42, 4, lambda _, content: entry(content, b"w/data/1", HEADER))],
    "8 bytes later": [(HEADER, 28, 2, lambda old, _: old + 8)],
    "compressed": [(HEADER, 8, 2, lambda *_: 8), (RECORD, 10, 2, lambda *_: 8)],
    "marked as a folder": [(RECORD, 38, 1, lambda old, _: old ^ 0x10)],
}


@pytest.mark.parametrize("forged", FORGED)
def test_forged_archive_is_refused(forged, tmp_path):
    path = save(tmp_path / "w.pth", {"a": torch.arange(6.0), "b": torch.arange(7.0)})
    content = bytearray(path.read_bytes())
    if "pickle" in forged:
        lengthen_in_the_pickle(content)
    for signature, place, size, number in FORGED[forged]:
        at = entry(content, b"w/data/0", signature) + place
        old = int.from_bytes(content[at : at + size], "little")
        content[at : at + size] = number(old, content).to_bytes(size, "little")
    path.write_bytes(content)
    reason = "its part w/data/0 is marked as a folder" if "folder" in forged else ""
    assert_refused(path, rf"w\.pth cannot be read as weights: {reason}")


def second_directory(first, second):
    """zipfile finds `second`, torch the stated place: that of `first`."""
    start, size, count = directory(second)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    return first[: start + size] + second[: start + size] + end


def second_locator(first, second):
    """Join two whole archives. The zip64 locator points to the first directory; zipfile takes the second."""
    record = first[-98:-42]
    start, size, count = directory(second)
    moved = struct.pack("<QQQQ", count, count, size, len(first) + start)
    shared = first + second[: start + size]
    return (
        shared + second[-98:-74] + moved + second[-42:-34] + struct.pack("<QI", first.index(record), 1) + second[-22:]
    )


def directory(archive):
    """Where the directory of an archive of torch.save begins, its size, the number of parts."""
    count, _, size, start = struct.unpack("<QQQQ", archive[-98:-42][24:])
    return start, size, count


@pytest.mark.parametrize("forge", [second_directory, second_locator])
def test_archive_with_two_directories_is_refused(forge, tmp_path):
    """torch.load reads one, zipfile and our checks the other."""
    first, second = (save(tmp_path / "w.pth", {"a": torch.arange(4.0) + n}).read_bytes() for n in (0, 100))
    (tmp_path / "w.pth").write_bytes(forge(first, second))
    assert torch.equal(torch.load(tmp_path / "w.pth", weights_only=True)["a"], torch.arange(4.0))
    assert_refused(tmp_path / "w.pth", "its directory is not where its last bytes say")
