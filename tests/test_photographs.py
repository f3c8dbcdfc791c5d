"""docs/photographs.py reads Qt resource files, and only the pictures that its list describes."""

import hashlib
import importlib.util
import json
import re
import struct
import zlib

import pytest
from paths import ROOT

SPEC = importlib.util.spec_from_file_location("photographs", ROOT / "docs" / "photographs.py")
photographs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(photographs)

FILES = {"a/one.txt": b"1" * 300, "a/b/two.txt": b"second", "three.txt": b""}


def rcc(entries, version=3, flags=0):
    """A Qt resource of files in folders, written in this order of nodes: breadth first."""
    size = 14 if version == 1 else 22
    tree, contents, names = [], bytearray(), bytearray()
    queue = [("", entries)]
    children = 1
    while queue:
        name, value = queue.pop(0)
        name_at = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(value, dict):
            tree.append(struct.pack(">IHII", name_at, photographs.FOLDER, len(value), children))
            children += len(value)
            queue += value.items()
        else:
            stored = (
                struct.pack(">I", len(value)) + zlib.compress(value) if flags & photographs.ZLIB else value
            )
            tree.append(struct.pack(">IHHHI", name_at, flags, 0, 0, len(contents)))
            contents += struct.pack(">I", len(stored)) + stored
    nodes = b"".join(node.ljust(size, b"\0") for node in tree)
    start = 24
    offsets = (start + len(contents) + len(names), start, start + len(contents))
    header = struct.pack(">4s4I", b"qres", version, *offsets) + bytes(4)
    return header + bytes(contents) + bytes(names) + nodes


TREE = {"a": {"one.txt": FILES["a/one.txt"], "b": {"two.txt": b"second"}}, "three.txt": b""}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("flags", [0, photographs.ZLIB])
def test_every_file_comes_back_by_its_path(version, flags):
    assert photographs.read_rcc(rcc(TREE, version, flags)) == FILES


def test_zstandard_entries_and_other_files_are_refused():
    with pytest.raises(ValueError, match=r"one\.txt is compressed by Zstandard|three\.txt is compressed"):
        photographs.read_rcc(rcc(TREE, flags=photographs.ZSTD))
    for data in (b"", b"qres", b"PK\3\4" + bytes(40), rcc(TREE, version=4)):
        with pytest.raises(ValueError, match="Qt resource"):
            photographs.read_rcc(data)


def test_a_resource_cut_off_anywhere_is_refused():
    data = rcc(TREE)
    for end in range(0, len(data) - 8, 3):  # the last 8 bytes are a time that nothing reads
        with pytest.raises(ValueError, match="Qt resource"):
            photographs.read_rcc(data[:end])


def test_a_folder_inside_itself_is_refused():
    data = bytearray(rcc({"a": {"b": {}}}))
    node = struct.unpack_from(">I", data, 8)[0] + 2 * 22
    data[node + 6 : node + 14] = struct.pack(">II", 1, 1)
    with pytest.raises(ValueError, match="node 1 is in two folders"):
        photographs.read_rcc(bytes(data))


def test_a_listed_file_is_read_from_its_archive_and_another_digest_is_refused(tmp_path):
    (tmp_path / "x.rcc").write_bytes(rcc(TREE))
    row = {"package": "p", "version": "1-2", "file": "x.rcc:a/b/two.txt"}
    row["sha256"] = hashlib.sha256(b"second").hexdigest()
    assert list(photographs.listed_files(tmp_path, [row])) == [(row, b"second")]
    with pytest.raises(ValueError, match=r"two\.txt has the SHA-256 .* fetch p 1-2"):
        list(photographs.listed_files(tmp_path, [row | {"sha256": "0" * 64}]))


def test_the_list_has_a_free_licence_author_and_source_for_every_picture():
    rows = [json.loads(line) for line in photographs.LIST.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["name"] for row in rows}) == len({row["file"] for row in rows}) > 200
    free = re.compile(r"public domain|CC0-1\.0|CC-BY(-SA)?-\d\.\d")
    for row in rows:
        assert free.fullmatch(row["license"]) and row["author"] and row["source"], row
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"]) and re.fullmatch(r"[^/\\]+", row["name"]), row
