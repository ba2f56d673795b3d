"""Archives with forged headers are refused: torch.load(mmap=True) believes what the pickle and the headers say."""

import struct
import zlib

import pytest
import torch
from weight_files import save

from utils import UserError
from weightfiles.lazy import open_weights
from weightfiles.read import read_weights


def entry(content, name, signature):
    """Where the header (b"PK\\3\\4") or directory record (b"PK\\1\\2") of an archive's part begins."""
    distance = {b"PK\3\4": 30, b"PK\1\2": 46}[signature]
    start = content.index(signature)
    while content[start + distance : start + distance + len(name)] != name:
        start = content.index(signature, start + 1)
    return start


def overwrite(content, start, value, size=4):
    content[start : start + size] = value.to_bytes(size, "little")


def longer_in_the_pickle(content):
    """The pickle says 100 values; the part has 6. Its checksum fits."""
    start = content.index(b"K\x06t")
    assert content.count(b"K\x06t") == 1
    content[start + 1] = 100
    pickled = zlib.crc32(content[content.index(b"\x80\x02}") : content.index(b"PK\7\x08", start)])
    overwrite(content, entry(content, b"w/data.pkl", b"PK\1\2") + 16, pickled)


def longer_in_the_directory(content):
    for at in (20, 24):
        overwrite(content, entry(content, b"w/data/0", b"PK\1\2") + at, 100)


def longer_everywhere(content):
    """Beyond the end of the file, in the pickle as well."""
    longer_in_the_pickle(content)
    for at in (20, 24):
        overwrite(content, entry(content, b"w/data/0", b"PK\1\2") + at, 400)


def beyond_the_file(content):
    overwrite(content, entry(content, b"w/data/0", b"PK\1\2") + 42, 2**31)


def on_another_part(content):
    other = entry(content, b"w/data/1", b"PK\3\4")
    overwrite(content, entry(content, b"w/data/0", b"PK\1\2") + 42, other)


def longer_header(content):
    """The values seem to begin 8 bytes later."""
    start = entry(content, b"w/data/0", b"PK\3\4") + 28
    overwrite(content, start, int.from_bytes(content[start : start + 2], "little") + 8, 2)


def marked_as_compressed(content):
    for signature, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        overwrite(content, entry(content, b"w/data/0", signature) + at, 8, 2)


FORGED = [longer_in_the_pickle, longer_in_the_directory, longer_everywhere, beyond_the_file, on_another_part]
FORGED += [longer_header, marked_as_compressed]


@pytest.mark.parametrize("forge", FORGED)
def test_forged_archive_is_refused(forge, tmp_path):
    path = save(tmp_path / "w.pth", {"a": torch.arange(6.0), "b": torch.arange(7.0)})
    content = bytearray(path.read_bytes())
    forge(content)
    path.write_bytes(content)
    for read in (read_weights, lambda path: dict(open_weights(path))):
        with pytest.raises(UserError, match=r"w\.pth cannot be read as weights: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def second_directory(first, second):
    """zipfile finds `second`, torch the stated place: that of `first`."""
    start, size, count = directory(second)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    return first[: start + size] + second[: start + size] + end


def second_locator(first, second):
    """Both have whole directories; the zip64 locator points to the first's, zipfile takes the one ahead of it."""
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
    for read in (read_weights, open_weights):
        with pytest.raises(UserError, match="its directory is not where its last bytes say"):
            read(tmp_path / "w.pth")
