"""`Tokens`: the value between encode and decode, and its packed form on disk (layout: `vistok.packing`)."""

import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .configuration import shorten
from .files import atomic_write, check_source
from .packing import (
    Reader,
    check_expansion,
    check_start,
    checked_body,
    index_widths,
    pack,
    seal,
    unpack,
    varint,
)
from .tile_layout import TileLayout

_KINDS = ("indices", "bits", "latents")
_LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WEIGHTS = re.compile(r"[0-9a-f]{8,64}")
_MOST_SIDES = 8  # of a grid in a file
_HAS_CODEBOOK_AXIS, _HAS_LENGTHS, _HAS_TOKENIZER, _HAS_NAMES = 4, 8, 16, 128


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """The tokens of B images, up to K each; exactly one of the first three fields is set.

    `indices` int64 [B, K] or [B, K, Q] (Q codebooks, each index in 0..codebook_sizes[q]-1); `bits` bool
    [B, K, D]; `latents` float16, bfloat16, float32 or float64 [B, K, D]. `lengths` int64 [B], each in 0..K,
    is the number of tokens per image; None means all K. Entries past an image's length are set to
    zero. `codebook_sizes` has one size per codebook and goes with `indices` only. `names` has one text per
    image, such as its file's, and does not count when tokens are compared. `grid` has the sides of the grid
    that the K tokens fill, row by row, where there is one: (height, width), or (frames, height, width) of a
    video; several tokens may share a place, so K is a multiple of the product of the sides.

    `tiles` is there for pictures that are larger or smaller than the images of their tokenizer
    (`Tokenizer.encode_tiles`). The tensors and `lengths` then have one row per tile, picture after picture,
    and B is the number of rows; everything else is per picture: `len`, indexing, iteration, `names` and
    `bits_per_image`. `grid` is (rows, columns) of tiles where all pictures have the same, and None where they
    differ; `prefix` keeps that many tokens of every tile.

    `weights` identifies the weights of the tokenizer that wrote the tokens, where a name has had several: the
    first digits of their SHA-256, in lower case. It goes with `tokenizer` only.

    Construction checks dtypes, shapes and devices (ValueError, or TypeError for what is not a tensor) but
    reads no values, so that it never waits for an accelerator; `validate` and `to_bytes` check the values.

        tokens = Tokens(indices=torch.randint(4096, (8, 32)), codebook_sizes=(4096,), tokenizer="titok-l32")
        tokens.save("eight.vtok")            # 8 * 32 * 12 bits, and 27 bytes around them
        Tokens.load("eight.vtok") == tokens  # True
    """

    indices: Tensor | None = None
    bits: Tensor | None = None
    latents: Tensor | None = None
    lengths: Tensor | None = None
    tokenizer: str | None = None
    codebook_sizes: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    grid: tuple[int, ...] | None = None
    tiles: TileLayout | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check dtypes, shapes and devices, and set the padding to zero."""
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"Tokens takes exactly one of {', '.join(_KINDS)}; got {' and '.join(kinds) or 'none'}"
            )
        for name in (*kinds, "lengths"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Tokens takes {name} as a torch.Tensor; got {type(value).__name__}")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise TypeError(
                f"Tokens takes the tokenizer's name as a str; got {type(self.tokenizer).__name__}"
            )
        if self.tokenizer is not None and "\0" in self.tokenizer:
            raise ValueError(
                f"Tokens takes a tokenizer's name without zero bytes; got {shorten(self.tokenizer)}"
            )
        if self.weights is not None:
            self._check_weights(self.weights)
        self._check_data()
        if self.tiles is not None:
            self._check_tiles(self.tiles)
        if self.codebook_sizes is not None:
            object.__setattr__(self, "codebook_sizes", self._checked_codebook_sizes(self.codebook_sizes))
        if self.names is not None:
            object.__setattr__(self, "names", self._checked_names(self.names))
        if self.tiles is not None:
            object.__setattr__(self, "grid", self.tiles.grid)
        elif self.grid is not None:
            object.__setattr__(self, "grid", self._checked_grid(self.grid))
        if self.lengths is not None:
            self._check_lengths()
            padding = torch.arange(self.num_tokens, device=self.device) >= self.lengths[:, None]  # [B, K]
            padding = padding.reshape(*padding.shape, *[1] * (self._data.ndim - 2))
            object.__setattr__(self, self._kind, self._data.masked_fill(padding, 0))

    def _check_data(self) -> None:
        kind, data = self._kind, self._data
        dtypes = {"indices": (torch.int64,), "bits": (torch.bool,), "latents": _LATENT_DTYPES}[kind]
        if data.dtype not in dtypes:
            accepted = ", ".join(map(str, dtypes))
            raise ValueError(f"Tokens takes {kind} as {accepted}; got {data.dtype}: convert with .to(dtype)")
        ranks, layout = ((2, 3), "[B, K] or [B, K, Q]") if kind == "indices" else ((3,), "[B, K, D]")
        if data.ndim not in ranks or 0 in data.shape[2:]:
            raise ValueError(
                f"Tokens takes {kind} as {layout}, the last axis not empty; got {list(data.shape)}"
            )

    def _check_weights(self, weights: str) -> None:
        if not isinstance(weights, str):
            raise TypeError(f"Tokens takes weights as a str of digits; got {type(weights).__name__}")
        if not self.tokenizer or not _WEIGHTS.fullmatch(weights):
            raise ValueError(
                "Tokens takes as weights 8 to 64 hexadecimal digits, beside a tokenizer; got "
                f"{shorten(weights)} with tokenizer {self.tokenizer!r}"
            )

    def _check_tiles(self, tiles: TileLayout) -> None:
        if not isinstance(tiles, TileLayout):
            raise TypeError(f"Tokens takes tiles as a TileLayout; got {type(tiles).__name__}")
        if tiles.total != self._rows:
            raise ValueError(
                f"Tokens of pictures in tiles have one row per tile, {tiles.total} for these {len(tiles)} "
                f"pictures; got {self._rows}"
            )
        if self.grid not in (None, tiles.grid):
            raise ValueError(f"the tiles of these pictures have the grid {tiles.grid}; got {self.grid}")

    def _check_lengths(self) -> None:
        if self.lengths.dtype != torch.int64 or self.lengths.shape != (self._rows,):
            got = f"{self.lengths.dtype} {list(self.lengths.shape)}"
            raise ValueError(f"Tokens takes lengths as int64 [B], here [{self._rows}]; got {got}")
        if self.lengths.device != self.device:
            raise ValueError(
                f"lengths are on {self.lengths.device}, {self._kind} on {self.device}: move one of them"
            )

    def _checked_codebook_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        if self._kind != "indices":
            raise ValueError(
                f"codebook_sizes describe indices; these Tokens hold {self._kind}: leave them out"
            )
        if not isinstance(sizes, (tuple, list)):
            raise TypeError(f"Tokens takes codebook_sizes as a tuple, one size per codebook; got {sizes!r}")
        sizes = tuple(operator.index(size) for size in sizes)
        if len(sizes) != self._width or not all(1 <= size <= 2**63 for size in sizes):
            raise ValueError(
                f"Tokens takes a codebook size per codebook, {self._width} here, in 1..2**63; got {sizes}"
            )
        return sizes

    def _checked_names(self, names: Sequence[str]) -> tuple[str, ...]:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"Tokens takes names as a tuple of texts, one per image; got {names!r}")
        names = tuple(names)
        if len(names) != len(self) or not all(names) or any("\0" in name for name in names):
            raise ValueError(
                f"Tokens takes one name per image, {len(self)} here, not empty and without zero bytes; got "
                f"{len(names)}"
            )
        return names

    def _checked_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        if not isinstance(grid, (tuple, list)):
            raise TypeError(f"Tokens takes the grid as a tuple of sides; got {grid!r}")
        sides = tuple(operator.index(side) for side in grid)
        if not sides or min(sides) < 1 or self.num_tokens % math.prod(sides):
            raise ValueError(
                f"Tokens takes the sides of a grid that {self.num_tokens} tokens fill, equally many at each "
                f"place; got {sides}"
            )
        return sides

    @property
    def _kind(self) -> str:
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def _data(self) -> Tensor:
        return getattr(self, self._kind)

    @property
    def _width(self) -> int:
        """Q codebooks, or D bits or channels."""
        return self._data.shape[2] if self._data.ndim == 3 else 1

    @property
    def _rows(self) -> int:
        """B, the rows of the tensors: images, or tiles."""
        return self._data.shape[0]

    def _with(self, data: Tensor, lengths: Tensor | None) -> "Tokens":
        return dataclasses.replace(self, **{self._kind: data}, lengths=lengths)

    def _full_lengths(self) -> Tensor:
        if self.lengths is not None:
            return self.lengths
        return torch.full((self._rows,), self.num_tokens, device=self.device)

    def _signature(self) -> dict[str, object]:
        """The properties that two Tokens must share to be joined or equal."""
        return {
            "kind": self._kind,
            "dtype": self._data.dtype,
            "shape of a token": list(self._data.shape[2:]),
            "codebook_sizes": self.codebook_sizes,
            "tokenizer": self.tokenizer,
            "weights": self.weights,
            "grid": self.grid if self.tiles is None else None,  # of tiles: of each picture, not of a part
            "kind of tiles": self.tiles and f"{self.tiles.side} pixels, overlap {self.tiles.overlap}",
        }

    @property
    def num_tokens(self) -> int:
        """K, the room for tokens per image (or tile); one with a length has that many of them."""
        return self._data.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._data.device

    @property
    def bits_per_image(self) -> Tensor:
        """Payload bits of every image, int64 [len], before `to_bytes` rounds their sum up to a byte.

        A token costs ceil(log2(size)) bits summed over its codebooks, D for bits, D times the dtype's width
        for latents. ValueError for indices without codebook_sizes.
        """
        bits = self._full_lengths() * self._bits_per_token()
        if self.tiles is None:
            return bits
        picture = torch.tensor(self.tiles.picture_of_tiles(), dtype=torch.int64, device=self.device)
        return bits.new_zeros(len(self)).index_add(0, picture, bits)

    def _bits_per_token(self) -> int:
        if self._kind == "indices":
            return sum(index_widths(self._require_codebook_sizes()))
        return self._width * (1 if self._kind == "bits" else 8 * self._data.element_size())

    def _require_codebook_sizes(self) -> tuple[int, ...]:
        if self.codebook_sizes is None:
            raise ValueError(
                "these Tokens have no codebook_sizes, so the width of an index is unknown: "
                "build them with codebook_sizes=(size, ...), one per codebook"
            )
        return self.codebook_sizes

    def __len__(self) -> int:
        """The number of images: B, or of pictures in tiles."""
        return self._rows if self.tiles is None else len(self.tiles)

    def __getitem__(self, index: int | slice | list[int] | list[bool] | Tensor | np.ndarray) -> "Tokens":
        """Pick images; the batch axis stays, so `tokens[3]` is a batch of one, and so does K."""
        rows = _batch_index(index, len(self))
        names, tiles = self.names, self.tiles
        if names is not None or tiles is not None:
            images = np.arange(len(self))[rows if isinstance(rows, slice) else rows.cpu().numpy()]
            names = None if names is None else tuple(names[image] for image in images)
        if tiles is not None:
            tiles, picked_tiles = tiles.pick(images)
            rows = torch.tensor(picked_tiles, dtype=torch.int64, device=self.device)
        return dataclasses.replace(
            self,
            **{self._kind: self._data[rows]},
            lengths=None if self.lengths is None else self.lengths[rows],
            names=names,
            grid=self.grid if tiles is None else tiles.grid,
            tiles=tiles,
        )

    def __iter__(self) -> Iterator["Tokens"]:
        """One image at a time, each a batch of one."""
        return (self[image] for image in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Same values, shape, dtype, tokenizer, weights, codebook sizes, grid and sizes of pictures, on any
        device.

        Padding is ignored; lengths that are all K equal no lengths; latents compare bit for bit, so
        that a NaN equals itself.
        """
        if not isinstance(other, Tokens):
            return NotImplemented
        if self._signature() != other._signature() or self._data.shape != other._data.shape:
            return False
        if self.tiles != other.tiles:
            return False
        return torch.equal(
            _as_integers(self._data), _as_integers(other._data).to(self.device)
        ) and torch.equal(self._full_lengths(), other._full_lengths().to(self.device))

    def __repr__(self) -> str:
        """Kind, shape and origin, without the values."""
        parts = [f"{self._kind}={str(self._data.dtype).removeprefix('torch.')} {list(self._data.shape)}"]
        if self.lengths is not None:
            parts.append("lengths=int64 " + str(list(self.lengths.shape)))
        parts += [
            f"{name}={value!r}"
            for name in ("tokenizer", "weights", "codebook_sizes", "grid", "tiles")
            for value in (getattr(self, name),)
            if value is not None
        ]
        return f"Tokens({', '.join(parts)}, device={str(self.device)!r})"

    @staticmethod
    def cat(parts: Iterable["Tokens"]) -> "Tokens":
        """Join batches, image after image.

        Where K differs, the shorter are padded and lengths are set. Names stay if all parts have them.
        ValueError for an empty list and for parts that differ in kind, dtype, D or Q, codebook sizes,
        tokenizer, grid (or side and overlap of tiles) or device. TypeError for a part that is not Tokens.
        """
        parts = list(parts)
        if others := [part for part in parts if not isinstance(part, Tokens)]:
            raise TypeError(f"Tokens.cat joins Tokens; a {type(others[0]).__name__} was given")
        if not parts:
            raise ValueError("Tokens.cat got no Tokens: it takes at least one")
        expected = {**parts[0]._signature(), "device": parts[0].device}
        for position, part in enumerate(parts):
            signature = {**part._signature(), "device": part.device}
            for name, value in signature.items():
                if value != expected[name]:
                    raise ValueError(
                        f"Tokens.cat takes parts of one {name}: part 0 has {expected[name]}, "
                        f"part {position} {value}"
                    )
        num_tokens = max(part.num_tokens for part in parts)
        ragged = any(part.lengths is not None or part.num_tokens != num_tokens for part in parts)
        data = torch.cat([_pad_tokens(part._data, num_tokens) for part in parts])
        named = all(part.names is not None for part in parts)
        tiles = parts[0].tiles
        if tiles is not None:
            tiles = dataclasses.replace(
                tiles, sizes=tuple(size for part in parts for size in part.tiles.sizes)
            )
        return dataclasses.replace(
            parts[0],
            **{parts[0]._kind: data},
            lengths=torch.cat([part._full_lengths() for part in parts]) if ragged else None,
            names=tuple(name for part in parts for name in part.names) if named else None,
            grid=parts[0].grid if tiles is None else tiles.grid,
            tiles=tiles,
        )

    def prefix(self, k: int) -> "Tokens":
        """Keep the first k tokens of every image or tile, k in 1..K; shorter ones keep all of theirs. A part
        of a grid has no grid; a grid of tiles stays."""
        k = operator.index(k)
        if not 1 <= k <= self.num_tokens:
            raise ValueError(
                f"prefix takes k in 1..{self.num_tokens}, the tokens that an image has here; got {k}"
            )
        lengths = None if self.lengths is None else self.lengths.clamp(max=k)
        grid = self.grid if k == self.num_tokens else None
        return dataclasses.replace(self, **{self._kind: self._data[:, :k]}, lengths=lengths, grid=grid)

    def to(self, target: torch.device | str | int | torch.dtype) -> "Tokens":
        """Move to a device, or convert latents to a dtype."""
        if isinstance(target, torch.dtype):
            if self._kind != "latents":
                raise ValueError(f"only latents change dtype; these Tokens hold {self._kind}, got {target}")
            return self._with(self._data.to(target), self.lengths)
        return self._with(self._data.to(target), None if self.lengths is None else self.lengths.to(target))

    def validate(self) -> None:
        """Check the values: lengths in 0..K, indices in 0..codebook_size-1. ValueError names an offender."""
        if self.lengths is not None:
            _check_range(self.lengths, self.num_tokens, "length", f"{self.num_tokens} tokens per image")
        if self._kind == "indices":
            indices = self._data.reshape(self._rows, self.num_tokens, self._width)
            for q in range(self._width):
                size = 2**63 if self.codebook_sizes is None else self.codebook_sizes[q]
                _check_range(indices[..., q], size - 1, "index", f"codebook {q} of size {size}")

    def to_bytes(self) -> bytes:
        """Pack without loss, each index at ceil(log2(codebook_size)) bits; the layout heads this file.

        The payload is ceil(sum(bits_per_image) / 8) bytes; the rest is some 26 bytes for one image. It is a
        ValueError for indices without codebook_sizes or with a value outside its codebook.
        """
        kind = self._kind
        widths = index_widths(self._require_codebook_sizes()) if kind == "indices" else ()
        self.validate()
        data = self._data.detach().cpu()
        flags = _KINDS.index(kind)
        header = bytearray(1)
        if self.tiles is not None:
            sides = [side for size in self.tiles.sizes for side in size]
            header += b"".join(map(varint, (self.tiles.side, self.tiles.overlap, len(self), *sides)))
        elif self.grid is not None:
            header += b"".join(map(varint, (len(self.grid), *self.grid)))
        header += varint(self._rows) + varint(self.num_tokens) + varint(self._width)
        header += b"".join(map(varint, self.codebook_sizes or ()))
        if kind == "indices" and data.ndim == 3:
            flags |= _HAS_CODEBOOK_AXIS
        if kind == "latents":
            flags |= _LATENT_DTYPES.index(data.dtype) << 5
        if self.tokenizer is not None:
            flags |= _HAS_TOKENIZER
            marks = [self.tokenizer] if self.weights is None else [self.tokenizer, self.weights]
            name = "\0".join(marks).encode()
            header += varint(len(name)) + name
        if self.names is not None:
            flags |= _HAS_NAMES
            names = "\0".join(self.names).encode(errors="surrogateescape")  # of files, not always UTF-8
            header += varint(len(names)) + names
        if self.lengths is None:
            data = data.flatten(0, 1)  # [N, ...], N tokens in all
        else:
            flags |= _HAS_LENGTHS
            lengths = self.lengths.cpu()
            header += pack(lengths[:, None].numpy(), [self.num_tokens.bit_length()])
            data = data[torch.arange(self.num_tokens) < lengths[:, None]]
        header[0] = flags
        if kind == "indices":
            payload = pack(data.reshape(-1, self._width).numpy(), widths)
        elif kind == "bits":
            payload = np.packbits(data.numpy()).tobytes()
        else:
            payload = _as_integers(data).numpy().astype(f"<i{data.itemsize}", copy=False).tobytes()
        version = 1 if self.names is None else 2
        if self.grid is not None or self.tiles is not None:
            version = 3 if self.tiles is None else 4
        return seal(bytes(header) + payload, version=version)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "Tokens":
        """Unpack what `to_bytes` packed, on the CPU.

        ValueError for anything else: not a token file, a newer version, truncated, trailing bytes, a checksum
        that does not match. The checksum is verified before any size in the header is used.
        """
        version, body = checked_body(np.frombuffer(bytes(data), np.uint8))
        reader = Reader(body)
        flags = reader.byte()
        kind_number, dtype_number = flags & 3, flags >> 5 & 3
        if kind_number >= len(_KINDS) or (version == 1 and flags & _HAS_NAMES):
            raise ValueError(f"corrupt vistok token file: unknown flags {flags:#04x}")
        kind, dtype = _KINDS[kind_number], _LATENT_DTYPES[dtype_number]
        grid = _unpack_grid(reader) if version == 3 else None
        tiles = _unpack_tiles(reader) if version == 4 else None
        batch, num_tokens, width = reader.varint(), reader.varint(), reader.varint()
        sizes = tuple(reader.varint() for _ in range(width)) if kind == "indices" else None
        if sizes is not None and not all(1 <= size <= 2**63 for size in sizes):
            raise ValueError(f"corrupt vistok token file: codebook sizes {sizes} are outside 1..2**63")
        tokenizer, weights = _unpack_tokenizer(reader) if flags & _HAS_TOKENIZER else (None, None)
        item = {"indices": 8, "bits": 1, "latents": dtype.itemsize}[kind]
        check_expansion(max(batch, 1) * max(num_tokens, 1) * width * item, len(reader.data))
        if tiles is not None and tiles.total != batch:
            raise ValueError(
                f"corrupt vistok token file: it has {batch} tiles, and pictures of the sizes in its header "
                f"have {tiles.total}"
            )
        images = batch if tiles is None else len(tiles)
        names = _unpack_names(reader, images) if flags & _HAS_NAMES else None
        lengths, count = None, batch * num_tokens
        if flags & _HAS_LENGTHS:
            lengths = unpack(reader, batch, [num_tokens.bit_length()])[:, 0]
            _check_range(torch.from_numpy(lengths), num_tokens, "length", f"{num_tokens} tokens per image")
            count = int(lengths.sum())

        if sizes is not None:
            values = unpack(reader, count, index_widths(sizes))
        elif kind == "bits":
            packed = reader.take((count * width + 7) // 8)
            values = np.unpackbits(packed, count=count * width).view(np.bool_).reshape(count, width)
        else:  # integers of the same bits
            integer = f"i{dtype.itemsize}"
            raw = reader.take(count * width * dtype.itemsize)
            values = raw.view(f"<{integer}").astype(f"={integer}").reshape(count, width)
        reader.finish()
        if lengths is not None:
            padded = np.zeros((batch, num_tokens, width), values.dtype)
            padded[np.arange(num_tokens) < lengths[:, None]] = values
            values = padded
        has_last_axis = kind != "indices" or flags & _HAS_CODEBOOK_AXIS
        tensor = torch.from_numpy(values.reshape(batch, num_tokens, *([width] if has_last_axis else [])))
        tokens = cls(
            **{kind: tensor.view(dtype) if kind == "latents" else tensor},
            lengths=None if lengths is None else torch.from_numpy(lengths),
            tokenizer=tokenizer,
            weights=weights,
            codebook_sizes=sizes,
            names=names,
            grid=grid,
            tiles=tiles,
        )
        tokens.validate()
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_bytes` to a file, whole or not at all; missing folders are made."""
        data = self.to_bytes()
        with atomic_write(path) as aside:
            aside.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokens":
        """Read a file that `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it is not an ordinary file.
            ValueError: as `from_bytes`.
        """
        path = check_source(path)
        try:
            with open(path, "rb") as file:
                check_start(np.frombuffer(file.read(16), np.uint8), path.stat().st_size)
            return cls.from_bytes(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _unpack_grid(reader: Reader) -> tuple[int, ...]:
    count = reader.varint()
    if not 1 <= count <= _MOST_SIDES:
        raise ValueError(f"corrupt vistok token file: a grid of {count} sides")
    return tuple(reader.varint() for _ in range(count))


def _unpack_tiles(reader: Reader) -> TileLayout:
    side, overlap, count = reader.varint(), reader.varint(), reader.varint()
    sizes = tuple((reader.varint(), reader.varint()) for _ in range(count))
    try:
        return TileLayout(sizes, side, overlap)
    except ValueError as error:
        raise ValueError(f"corrupt vistok token file: {error}") from error


def _unpack_tokenizer(reader: Reader) -> tuple[str, str | None]:
    """A tokenizer's name and the mark of its weights, if the file has one."""
    try:
        text = reader.take(reader.varint()).tobytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError("corrupt vistok token file: the tokenizer's name is not UTF-8") from error
    name, separator, weights = text.partition("\0")
    if separator and not (name and _WEIGHTS.fullmatch(weights)):
        raise ValueError(
            f"corrupt vistok token file: the weights of its tokenizer are {shorten(weights)}, not digits"
        )
    return name, weights if separator else None


def _unpack_names(reader: Reader, batch: int) -> tuple[str, ...]:
    text = reader.take(reader.varint()).tobytes().decode(errors="surrogateescape")
    names = tuple(text.split("\0")) if batch else ()
    if len(names) != batch or not all(names) or (text and not batch):
        raise ValueError(f"corrupt vistok token file: it has {len(names)} names for {batch} images")
    return names


def _batch_index(
    index: int | slice | list[int] | list[bool] | Tensor | np.ndarray, size: int
) -> slice | Tensor:
    """The index of rows of a batch of `size` for torch, keeping the batch axis."""
    if isinstance(index, slice):
        rows = range(size)[index]
        return index if rows.step > 0 else torch.tensor(list(rows), dtype=torch.int64)
    if isinstance(index, list) or getattr(index, "ndim", 0):
        picked = torch.as_tensor(index) if len(index) else torch.zeros(0, dtype=torch.int64)
        if picked.ndim != 1 or picked.is_floating_point():
            raise TypeError(
                f"Tokens are indexed by integers or a mask over images; got {picked.dtype} {index!r}"
            )
        return picked if picked.dtype == torch.bool else picked.long()
    try:
        image = operator.index(index)
    except TypeError:
        raise TypeError(
            f"Tokens are indexed by an int, a slice, a list or a 1D tensor; got {index!r}"
        ) from None
    if not -size <= image < size:
        raise IndexError(f"image {image} of a batch of {size}")
    return slice(image % size, image % size + 1)


def _pad_tokens(data: Tensor, num_tokens: int) -> Tensor:
    missing = num_tokens - data.shape[1]
    return torch.cat([data, data.new_zeros(len(data), missing, *data.shape[2:])], dim=1) if missing else data


def _as_integers(data: Tensor) -> Tensor:
    """Floats as integers of the same bits; anything else as it is."""
    if not data.is_floating_point():
        return data
    return data.detach().contiguous().view(_INTEGER_OF_SIZE[data.element_size()])


def _check_range(values: Tensor, highest: int, what: str, owner: str) -> None:
    if values.numel() == 0:
        return
    low, high = (int(extreme) for extreme in values.aminmax())
    if low < 0 or high > highest:
        raise ValueError(f"{what} {low if low < 0 else high} is outside 0..{highest} ({owner})")
