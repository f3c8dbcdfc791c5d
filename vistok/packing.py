"""The packed form of tokens: bit packing, numbers, and a container with a checksum.

The packed form, versions 1 to 4 (integers are LEB128 varints unless a width is named):

    "VTOK" | version: 1 byte | bytes that follow | header | payload | CRC32 of all before it: 4 bytes

    header   flags: 1 byte (bits 0-1 kind, 2 Q axis, 3 lengths, 4 tokenizer's name, 5-6 dtype of latents,
             7 names of the images: from version 2 on, which is written only for files that have them)
             version 3, written only for tokens with a grid: how many sides it has, and the sides
             version 4, written only for pictures in tiles: side of a tile, overlap, the number of pictures,
             and height and width of each; B is then the number of tiles
             B | K | D, or Q and the Q codebook sizes | the tokenizer's byte count and UTF-8 of its
             name, after which its weights may be marked: a zero byte and 8 to 64 hexadecimal digits
             the names' byte count and UTF-8 of all, a zero byte between two
             lengths, each packed at K.bit_length() bits
    payload  the tokens of all images in order, padding left out; indices at ceil(log2(codebook size)) bits
             each, most significant bit first, one codebook after the other; bits at one bit each; latents as
             raw numbers (these and the CRC32 little-endian)
"""

import zlib
from collections.abc import Sequence

import numpy as np

MAGIC = b"VTOK"
VERSION = 4
_CHUNK = 1 << 16  # tokens packed at a time; a multiple of 8, so that every chunk ends on a whole byte
_FREE_BYTES = 1 << 26  # a file may unpack to this many bytes whatever its size; see check_expansion


def index_widths(codebook_sizes: Sequence[int]) -> list[int]:
    """Bits per index, ceil(log2(size))."""
    return [(size - 1).bit_length() for size in codebook_sizes]


def pack(values: np.ndarray, widths: Sequence[int]) -> bytes:
    """Pack int64 [N, Q] at widths[q] bits each, row after row, big-endian bits; zeros fill the last byte."""
    packed = []
    for start in range(0, len(values), _CHUNK):
        columns = []
        for column, width in zip(values[start : start + _CHUNK].T, widths, strict=True):
            used = (width + 7) // 8
            octets = np.ascontiguousarray(column.astype(">i8")).view(np.uint8).reshape(-1, 8)[:, 8 - used :]
            columns.append(np.unpackbits(octets, axis=1)[:, 8 * used - width :])
        packed.append(np.packbits(np.concatenate(columns, axis=1)).tobytes())
    return b"".join(packed)


def unpack(reader: "Reader", count: int, widths: Sequence[int]) -> np.ndarray:
    """Undo `pack`: the next bytes of a file to int64 [count, Q]."""
    total = sum(widths)
    packed = reader.take((count * total + 7) // 8)
    values = np.zeros((count, len(widths)), np.int64)
    for start in range(0, count, _CHUNK):
        rows = min(_CHUNK, count - start)
        first = start * total // 8
        chunk = packed[first : first + (rows * total + 7) // 8]
        bits = np.unpackbits(chunk, count=rows * total).reshape(rows, total)
        for q, width in enumerate(widths):
            column, bits = bits[:, :width], bits[:, width:]
            octets = np.zeros((rows, 64), np.uint8)
            octets[:, 64 - width :] = column
            values[start : start + rows, q] = np.packbits(octets, axis=1).view(">i8")[:, 0]
    return values


def varint(value: int) -> bytes:
    """LEB128: seven bits per byte, lowest first, the top bit set on all but the last."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


class Reader:
    """Reads a header front to back, and refuses to read past its end."""

    def __init__(self, data: np.ndarray, offset: int = 0) -> None:
        self.data, self.offset = data, offset

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes."""
        if count > len(self.data) - self.offset:
            left = len(self.data) - self.offset
            raise ValueError(
                f"corrupt vistok token file: the header states {count} bytes where {left} are left"
            )
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def byte(self) -> int:
        """The next byte as a number."""
        return int(self.take(1)[0])

    def varint(self) -> int:
        """The next LEB128 number."""
        value = 0
        for shift in range(0, 70, 7):
            octet = self.byte()
            value |= (octet & 127) << shift
            if octet < 128:
                return value
        raise ValueError("corrupt vistok token file: a number in the header does not end")

    def finish(self) -> None:
        """Raise ValueError for bytes after the last value."""
        if self.offset != len(self.data):
            left = len(self.data) - self.offset
            raise ValueError(f"corrupt vistok token file: {left} bytes more than the header states")


def seal(content: bytes, version: int) -> bytes:
    """A whole packed file around header and payload: magic, version and size before them, a CRC32 behind."""
    body = b"".join([MAGIC, bytes([version]), varint(len(content) + 4), content])
    return body + zlib.crc32(body).to_bytes(4, "little")


def check_start(data: np.ndarray, size: int) -> tuple[int, int]:
    """Return version and offset of the header, once magic, version and length fit a file of `size` bytes.

    `data` are its first 16 bytes or more.
    """
    start = data[: len(MAGIC)].tobytes()
    if start != MAGIC[: len(start)]:
        raise ValueError(f"not a vistok token file: it starts with {start!r}, not {MAGIC!r}")
    if size < len(MAGIC) + 2:
        raise ValueError(f"truncated vistok token file: got {size} bytes, too few for a header")
    version = int(data[len(MAGIC)])
    if version > VERSION:
        raise ValueError(
            f"vistok token file of version {version}, newer than version {VERSION} read here: upgrade vistok"
        )
    if version < 1:
        raise ValueError(f"corrupt vistok token file: version {version} does not exist")
    reader = Reader(data, len(MAGIC) + 1)
    try:
        promised = reader.varint() + reader.offset
    except ValueError:
        raise ValueError(
            f"truncated or corrupt vistok token file: got {size} bytes, its size is unreadable"
        ) from None
    if size < promised:
        raise ValueError(f"truncated vistok token file: got {size} bytes, the header states {promised}")
    if size > promised:
        raise ValueError(
            f"{size - promised} trailing bytes after a vistok token file: "
            f"got {size} bytes, the header states {promised}"
        )
    return version, reader.offset


def checked_body(data: np.ndarray) -> tuple[int, np.ndarray]:
    """Version, and header and payload [bytes], once magic, version, length and checksum are right."""
    version, offset = check_start(data, len(data))
    checksum, body = int.from_bytes(data[-4:].tobytes(), "little"), data[:-4]
    if zlib.crc32(body) != checksum:
        raise ValueError("corrupt vistok token file: checksum mismatch, some of its bytes have changed")
    return version, body[offset:]


def check_expansion(unpacked_bytes: int, file_bytes: int) -> None:
    """Refuse a small file with very large tensors: padding and one-word codebooks cost no payload."""
    if unpacked_bytes > max(_FREE_BYTES, 1024 * file_bytes):
        raise ValueError(
            f"corrupt vistok token file: {file_bytes} bytes would unpack to {unpacked_bytes} with padding"
        )
