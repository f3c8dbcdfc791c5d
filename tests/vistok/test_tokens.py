"""Tokens: the packed form loses nothing and notices everything; slicing, joining and shortening agree."""

import dataclasses
import os
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok import Tokens
from vistok.packing import VERSION, seal

LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = st.one_of(st.integers(2, 2**18), st.integers(1, 18).map(lambda power: 2**power))
quick = settings(deadline=None, max_examples=200)


@st.composite
def shapes(draw):
    """B, K, lengths or None, and a seeded generator."""
    batch, num_tokens = draw(st.integers(0, 4)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lengths = torch.randint(num_tokens + 1, (batch,), generator=generator) if draw(st.booleans()) else None
    return batch, num_tokens, lengths, generator


@st.composite
def indices(draw):
    batch, num_tokens, lengths, generator = draw(shapes())
    sizes = draw(st.lists(SIZES, min_size=1, max_size=4))
    columns = [torch.randint(size, (batch, num_tokens), generator=generator) for size in sizes]
    for column, size in zip(columns, sizes, strict=True):
        column.flatten()[:1] = size - 1  # the largest index is the one that a width too small would cut
    flat = len(sizes) == 1 and draw(st.booleans())
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    name = draw(st.none() | st.text(characters, max_size=12))
    weights = draw(st.none() | st.from_regex(r"[0-9a-f]{8,64}", fullmatch=True)) if name else None
    data = columns[0] if flat else torch.stack(columns, dim=2)
    return Tokens(indices=data, lengths=lengths, tokenizer=name, codebook_sizes=tuple(sizes), weights=weights)


@st.composite
def bits(draw):
    batch, num_tokens, lengths, generator = draw(shapes())
    size = (batch, num_tokens, draw(st.integers(1, 19)))
    return Tokens(bits=torch.randint(2, size, generator=generator).bool(), lengths=lengths)


@st.composite
def latents(draw):
    """Any bit pattern: infinities, subnormals, negative zeros and NaNs with payloads among them."""
    batch, num_tokens, lengths, generator = draw(shapes())
    dtype = draw(st.sampled_from(LATENT_DTYPES))
    size = (batch, num_tokens, draw(st.integers(1, 5)))
    limits = torch.iinfo(INTEGERS[dtype.itemsize])
    patterns = torch.randint(
        limits.min, limits.max, size, generator=generator, dtype=INTEGERS[dtype.itemsize]
    )
    return Tokens(latents=patterns.view(dtype), lengths=lengths, tokenizer="continuous")


ANY = st.one_of(indices(), bits(), latents())


def assert_identical(found: Tokens, expected: Tokens) -> None:
    """Field by field and bit by bit, without the help of `Tokens.__eq__`."""
    assert found.tokenizer == expected.tokenizer
    assert found.codebook_sizes == expected.codebook_sizes
    for name in ("indices", "bits", "latents", "lengths"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert raw(ours) == raw(theirs), name


def raw(tensor: torch.Tensor) -> bytes:
    if tensor.is_floating_point():
        tensor = tensor.contiguous().view(INTEGERS[tensor.itemsize])
    return tensor.numpy().tobytes()


def example(batch=3, num_tokens=5, sizes=(4096,), lengths=None, name="titok-l32", seed=0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (batch, num_tokens), generator=generator) for size in sizes]
    data = columns[0] if len(sizes) == 1 else torch.stack(columns, dim=2)
    lengths = None if lengths is None else torch.tensor(lengths)
    return Tokens(indices=data, lengths=lengths, tokenizer=name, codebook_sizes=sizes)


def in_kind(kind: str, batch: int, num_tokens: int, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    if kind == "indices":
        return example(batch, num_tokens, (1000, 7), seed=seed)
    values = torch.randn(batch, num_tokens, 3, generator=generator)
    return Tokens(bits=values > 0) if kind == "bits" else Tokens(latents=values)


# The packed form --------------------------------------------------------------------------------------------


@quick
@given(ANY)
def test_packing_and_unpacking_gives_back_every_bit(tokens):
    assert_identical(Tokens.from_bytes(tokens.to_bytes()), tokens)


@quick
@given(indices())
def test_equal_tokens_pack_to_equal_bytes_whatever_buffer_they_come_in(tokens):
    packed = tokens.to_bytes()
    for buffer in (bytearray(packed), memoryview(packed)):
        assert Tokens.from_bytes(buffer).to_bytes() == packed


@pytest.mark.parametrize("sizes", [(2,), (3, 5), (2**18,), (1, 2**62), (1,)])
def test_packing_crosses_the_borders_of_its_chunks(sizes):
    tokens = example(batch=2, num_tokens=70_001, sizes=sizes)
    assert_identical(Tokens.from_bytes(tokens.to_bytes()), tokens)


@pytest.mark.parametrize("dtype", LATENT_DTYPES, ids=str)
def test_nan_payloads_survive(dtype):
    integer = INTEGERS[dtype.itemsize]
    highest = torch.iinfo(integer).max
    patterns = torch.tensor([highest, highest - 1, -1, -2], dtype=integer)  # NaNs, all different
    tokens = Tokens(latents=patterns.view(dtype).reshape(1, 2, 2))
    assert tokens.latents.isnan().all()
    found = Tokens.from_bytes(tokens.to_bytes())
    assert torch.equal(found.latents.view(integer).flatten(), patterns)
    assert found == tokens
    assert found != Tokens(latents=patterns.flip(0).view(dtype).reshape(1, 2, 2))


def test_unpacked_tensors_can_be_written_to():
    for kind in ("indices", "bits", "latents"):
        getattr(Tokens.from_bytes(in_kind(kind, 2, 3).to_bytes()), kind).zero_()


def test_non_contiguous_and_grad_requiring_tensors_pack_like_their_copies():
    base = torch.randn(4, 3, 2, requires_grad=True)
    turned = Tokens(latents=base.transpose(0, 1))
    assert turned.to_bytes() == Tokens(latents=base.detach().transpose(0, 1).contiguous()).to_bytes()


def test_sixty_four_tokens_of_sixteen_bits_take_128_bytes_and_under_40_around_them():
    tokens = example(1, 64, (2**16,), name="vistok-mini")
    assert tokens.bits_per_image.tolist() == [64 * 16]
    assert 128 < len(tokens.to_bytes()) < 128 + 40
    nameless = example(1, 64, (2**16,), name=None)
    assert len(tokens.to_bytes()) - len(nameless.to_bytes()) == len("vistok-mini") + 1


def marked(weights="0123abcd", **options):
    return dataclasses.replace(example(**options), weights=weights)


def test_the_mark_of_weights_takes_its_digits_and_a_byte_and_comes_back():
    tokens = marked()
    again = Tokens.from_bytes(tokens.to_bytes())
    assert again == tokens and again.weights == "0123abcd" and again.tokenizer == "titok-l32"
    assert len(tokens.to_bytes()) - len(example().to_bytes()) == 9
    assert "weights='0123abcd'" in repr(tokens)


def test_a_mark_stays_with_the_tokens_and_others_differ():
    tokens = marked()
    parts = [tokens[1:], tokens.prefix(2), Tokens.cat([tokens, tokens]), tokens.to("cpu"), next(iter(tokens))]
    assert {part.weights for part in parts} == {"0123abcd"}
    assert tokens != example() and tokens != marked("0123abce")
    with pytest.raises(ValueError, match=r"parts of one weights: part 0 has 0123abcd, part 1 None"):
        Tokens.cat([tokens, example()])


@pytest.mark.parametrize("weights", ["", "0123abc", "0123ABCD", "0123abcg", "0" * 65, "0123abcd\0"])
def test_a_mark_of_other_characters_is_refused(weights):
    with pytest.raises(ValueError, match="8 to 64 hexadecimal digits"):
        marked(weights)


def test_a_mark_goes_with_a_name():
    for name in (None, ""):
        with pytest.raises(ValueError, match="beside a tokenizer"):
            marked(name=name)
    with pytest.raises(TypeError, match="got int"):
        marked(12345678)
    with pytest.raises(ValueError, match="without zero bytes"):
        example(name="titok-l32\x000123abcd")


def test_a_file_whose_mark_is_not_digits_is_refused():
    data = bytearray(marked().to_bytes())
    place = data.index(b"0123abcd")
    data[place] = ord("x")
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    with pytest.raises(ValueError, match="corrupt vistok token file: the weights of its tokenizer"):
        Tokens.from_bytes(bytes(data))


def test_the_docstring_promises_the_size_that_is_written():
    tokens = Tokens(indices=torch.randint(4096, (8, 32)), codebook_sizes=(4096,), tokenizer="titok-l32")
    assert len(tokens.to_bytes()) == 8 * 32 * 12 // 8 + 27


@quick
@given(ANY)
def test_the_payload_is_the_sum_of_bits_per_image_rounded_up_to_a_byte(tokens):
    payload = -(-int(tokens.bits_per_image.sum()) // 8)
    name = len((tokens.tokenizer or "").encode()) + len(tokens.weights or "") + (tokens.weights is not None)
    around = len(tokens.to_bytes()) - payload
    assert 0 < around - name <= 12 + 2 + 4 * 3 + len(tokens) + 8


def test_bits_per_image_counts_every_codebook_and_every_length():
    assert example(2, 5, (4096,)).bits_per_image.tolist() == [60, 60]
    assert example(2, 5, (4096, 4097, 2, 1)).bits_per_image.tolist() == [5 * 26] * 2
    assert example(3, 5, (4096,), lengths=[0, 2, 5]).bits_per_image.tolist() == [0, 24, 60]
    assert in_kind("bits", 1, 4).bits_per_image.tolist() == [12]
    assert in_kind("latents", 1, 4).bits_per_image.tolist() == [4 * 3 * 32]
    assert in_kind("latents", 1, 4).to(torch.bfloat16).bits_per_image.tolist() == [4 * 3 * 16]
    assert example(2, 5).bits_per_image.dtype == torch.int64


def test_without_codebook_sizes_there_is_no_width_and_no_packing():
    tokens = Tokens(indices=torch.zeros(1, 2, dtype=torch.int64))
    for use in (tokens.to_bytes, lambda: tokens.bits_per_image):
        with pytest.raises(ValueError, match=r"no codebook_sizes.*codebook_sizes=\(size, \.\.\.\)"):
            use()


# Damage -----------------------------------------------------------------------------------------------------

DAMAGED = {
    "indices": example(2, 6, (4096, 5), lengths=[3, 6]),
    "bits": in_kind("bits", 2, 5),
    "latents": in_kind("latents", 1, 2),
    "empty": example(0, 0),
}
SAYS_SO = "vistok token file"


@pytest.mark.parametrize("tokens", DAMAGED.values(), ids=DAMAGED)
def test_any_single_changed_byte_is_noticed(tokens):
    packed = tokens.to_bytes()
    for position in range(len(packed)):
        for change in (1, 0x80, 0xFF, 0x55):
            broken = bytearray(packed)
            broken[position] ^= change
            with pytest.raises(ValueError, match=SAYS_SO):
                Tokens.from_bytes(broken)


@pytest.mark.parametrize("tokens", DAMAGED.values(), ids=DAMAGED)
def test_any_truncation_is_noticed(tokens):
    packed = tokens.to_bytes()
    for length in range(len(packed)):
        with pytest.raises(ValueError, match=rf"truncated.*{SAYS_SO}: got {length} bytes"):
            Tokens.from_bytes(packed[:length])


@quick
@given(ANY, st.binary(min_size=1, max_size=9))
def test_any_appended_byte_is_noticed(tokens, tail):
    with pytest.raises(ValueError, match=f"{len(tail)} trailing bytes after a {SAYS_SO}"):
        Tokens.from_bytes(tokens.to_bytes() + tail)


@quick
@given(ANY, st.data())
def test_any_missing_byte_in_the_middle_is_noticed(tokens, data):
    packed = tokens.to_bytes()
    position = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ValueError, match=SAYS_SO):
        Tokens.from_bytes(packed[:position] + packed[position + 1 :])


def test_a_changed_payload_is_a_checksum_mismatch():
    packed = bytearray(example().to_bytes())
    packed[-5] ^= 1
    with pytest.raises(ValueError, match="checksum mismatch"):
        Tokens.from_bytes(packed)


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(30), b"VTOJ", b"X"])
def test_other_files_are_told_apart_by_their_magic_number(data):
    with pytest.raises(ValueError, match=r"not a vistok token file: it starts with .*not b'VTOK'"):
        Tokens.from_bytes(data)


def test_a_newer_version_asks_for_an_upgrade():
    packed = bytearray(example().to_bytes())
    packed[4] = VERSION + 1
    newer = f"version {VERSION + 1}, newer than version {VERSION} read here: upgrade vistok"
    with pytest.raises(ValueError, match=newer):
        Tokens.from_bytes(packed)


def sealed(header: bytes) -> bytes:
    """A file whose length and checksum are right, around a header that need not be."""
    body = b"VTOK\x01" + bytes([len(header) + 4]) + header
    return body + zlib.crc32(body).to_bytes(4, "little")


VAST = b"\xff\xff\xff\xff\x7f"  # 2**35 - 1
FORGED = {
    "unknown kind": (b"\x03\x01\x01\x01", "unknown flags 0x03"),
    "unknown flag": (b"\x80\x01\x01\x01", "unknown flags 0x80"),
    "no header": (b"", "states 1 bytes where 0 are left"),
    "endless number": (b"\x00" + b"\xff" * 12, "does not end"),
    "no such codebook": (b"\x00\x01\x01\x01\x00", r"codebook sizes \(0,\) are outside"),
    "vast tensor in few bytes": (
        b"\x00\x01" + VAST + b"\x01\x01",
        "would unpack to 274877906936 with padding",
    ),
    "vast batch of no tokens": (
        b"\x08" + VAST + b"\x00\x01\x02",
        "would unpack to 274877906936 with padding",
    ),
    "millions of words of no bits": (
        b"\x00\x01\x80\x80\x80\x10\x01\x01",
        "would unpack to 268435456 with padding",
    ),
    "a tokenizer's name of other bytes": (b"\x10\x01\x01\x01\x01\x01\xff", "name is not UTF-8"),
    "missing payload": (b"\x01\x01\x09\x01\xff", "states 2 bytes where 1 are left"),
    "surplus payload": (b"\x01\x01\x08\x01\xff\xff", "1 bytes more than the header states"),
    "index outside its codebook": (b"\x00\x01\x01\x01\x03\xc0", r"index 3 is outside 0\.\.2"),
    "length over K": (b"\x09\x01\x02\x01\xc0", r"length 3 is outside 0\.\.2"),
}


@pytest.mark.parametrize(("header", "message"), FORGED.values(), ids=FORGED)
def test_a_forged_header_with_a_right_checksum_is_not_believed(header, message):
    with pytest.raises(ValueError, match=message):
        Tokens.from_bytes(sealed(header))


def test_the_layout_of_version_1_is_frozen():
    tokens = Tokens(indices=torch.tensor([[1, 2, 0], [5, 0, 0]]), lengths=torch.tensor([2, 1]), tokenizer="t",
                    codebook_sizes=(6,))  # fmt: skip
    header = bytes([0b11000, 2, 3, 1, 6, 1]) + b"t" + bytes([0b10_01_0000])
    payload = bytes([0b001_010_10, 0b1_0000000])
    assert tokens.to_bytes() == sealed(header + payload)


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_one_or_many_images_come_back_from_a_file(tmp_path, batch):
    tokens = example(batch)
    tokens.save(tmp_path / "new" / "images.vtok")
    tokens.save(str(tmp_path / "text.vtok"))
    assert_identical(Tokens.load(tmp_path / "new" / "images.vtok"), tokens)
    assert_identical(Tokens.load(str(tmp_path / "text.vtok")), tokens)


def test_saving_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "images.vtok"
    example(2).save(path)
    example(5).save(path)
    assert len(Tokens.load(path)) == 5
    assert list(tmp_path.iterdir()) == [path]


def test_tokens_that_cannot_be_packed_leave_the_old_file(tmp_path):
    path = tmp_path / "images.vtok"
    example(2).save(path)
    with pytest.raises(ValueError, match="codebook"):
        Tokens(indices=torch.full((1, 1), 9), codebook_sizes=(9,)).save(path)
    assert Tokens.load(path) == example(2)
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "images.vtok"
    example(2).save(path)

    def half_written(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", half_written)
    with pytest.raises(OSError, match="disk full"):
        example(5).save(path)
    assert Tokens.load(path) == example(2)
    assert list(tmp_path.iterdir()) == [path]


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "half.vtok"
    path.write_bytes(example().to_bytes()[:-3])
    with pytest.raises(ValueError, match=r"half\.vtok: truncated vistok token file"):
        Tokens.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.vtok"):
        Tokens.load(tmp_path / "none.vtok")


@pytest.mark.parametrize(
    "names",
    [("a.png", "b/c.jpg", "ü 🐈.png"), ("same", "same", "\udcff"), ("../x", "/etc/passwd", "n" * 5000)],
)
def test_names_of_images_come_back_from_a_file_and_follow_their_images(tmp_path, names):
    tokens = dataclasses.replace(example(3), names=names)
    tokens.save(tmp_path / "a.vtok")
    loaded = Tokens.load(tmp_path / "a.vtok")
    assert loaded.names == names and loaded == example(3)
    assert loaded[1:].names == names[1:] and loaded[[2, 0]].names == (names[2], names[0])
    assert loaded[torch.tensor([True, False, True])].names == (names[0], names[2])
    assert loaded.prefix(1).names == names and loaded.to("cpu").names == names
    assert Tokens.cat([loaded[:1], loaded[1:]]).names == names
    assert Tokens.cat([loaded, example(1)]).names is None


def test_files_without_names_are_of_version_1_and_those_with_names_of_2():
    assert example(2).to_bytes()[4] == 1
    named = dataclasses.replace(example(2), names=("a", "b")).to_bytes()
    assert named[4] == 2
    with pytest.raises(ValueError, match=r"unknown flags|checksum"):
        Tokens.from_bytes(named[:4] + b"\x01" + named[5:])


@pytest.mark.parametrize(
    ("names", "error"),
    [(("a",), ValueError), (("a", ""), ValueError), ("ab", TypeError), (("a", 3), TypeError)],
)
def test_names_are_one_text_per_image(names, error):
    with pytest.raises(error, match="Tokens takes"):
        dataclasses.replace(example(2), names=names)


def test_pipes_and_sparse_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.vtok")
    with pytest.raises(OSError, match=r"pipe.vtok is a named pipe"):
        Tokens.load(tmp_path / "pipe.vtok")
    example(2).save(tmp_path / "a.vtok")
    os.truncate(tmp_path / "a.vtok", 2**40)
    with pytest.raises(ValueError, match=r"a.vtok: .* trailing bytes"):
        Tokens.load(tmp_path / "a.vtok")
    with open(tmp_path / "b.vtok", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"b.vtok: not a vistok token file"):
        Tokens.load(tmp_path / "b.vtok")


# Slicing, joining, shortening -------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["indices", "bits", "latents"])


@quick
@given(ANY)
def test_the_images_of_a_batch_joined_again_are_the_batch(tokens):
    images = list(tokens)
    assert [len(image) for image in images] == [1] * len(tokens)
    if images:
        assert_identical(Tokens.cat(images), tokens)


@quick
@given(ANY, st.data())
def test_prefixes_nest_and_commute_with_slicing_and_packing(tokens, data):
    if tokens.num_tokens == 0:
        return
    long = data.draw(st.integers(1, tokens.num_tokens))
    short = data.draw(st.integers(1, long))
    prefix = tokens.prefix(short)
    assert prefix.num_tokens == short
    assert tokens.prefix(tokens.num_tokens) == tokens
    assert tokens.prefix(long).prefix(short) == prefix
    assert Tokens.from_bytes(prefix.to_bytes()) == prefix
    rows = slice(data.draw(st.integers(0, 4)), None, data.draw(st.sampled_from([1, 2, -1])))
    assert tokens[rows].prefix(short) == prefix[rows]


@KINDS
def test_a_prefix_holds_the_first_tokens(kind):
    tokens = in_kind(kind, 3, 6)
    assert torch.equal(getattr(tokens.prefix(4), kind), getattr(tokens, kind)[:, :4])
    ragged = Tokens.cat([tokens[:1].prefix(2), tokens[1:]])
    assert ragged.prefix(4).lengths.tolist() == [2, 4, 4]


@pytest.mark.parametrize("k", [0, -1, 7])
def test_a_prefix_of_more_than_there_is_or_of_nothing_says_what_is_accepted(k):
    with pytest.raises(ValueError, match=rf"prefix takes k in 1\.\.6.*got {k}"):
        example(2, 6).prefix(k)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [4]),
        (np.int64(2), [2]),
        (torch.tensor(3), [3]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(4, 1), []),
        ([3, 0, 3], [3, 0, 3]),
        ([-1], [4]),
        ([], []),
        ([True, False, False, True, False], [0, 3]),
        (np.array([1, 4]), [1, 4]),
        (torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool), [1]),
    ],
    ids=repr,
)
def test_an_index_picks_images_and_keeps_the_batch_axis(index, rows):
    tokens = example(5, 4, (50, 60), lengths=[0, 1, 2, 3, 4])
    picked = tokens[index]
    assert torch.equal(picked.indices, tokens.indices[rows])
    assert picked.lengths.tolist() == rows
    assert (picked.tokenizer, picked.codebook_sizes) == (tokens.tokenizer, tokens.codebook_sizes)


@pytest.mark.parametrize("index", [5, -6, [5]])
def test_an_image_outside_the_batch_is_an_index_error(index):
    with pytest.raises(IndexError):
        example(5)[index]


@pytest.mark.parametrize("index", [1.0, "1", None, (0, 1), [0.5], [[1]], np.array([1.5])], ids=repr)
def test_what_is_no_index_over_images_is_a_type_error(index):
    with pytest.raises(TypeError, match="Tokens are indexed by"):
        example(5)[index]


@KINDS
def test_joining_different_lengths_pads_and_remembers(kind):
    short, long = in_kind(kind, 1, 2), in_kind(kind, 2, 5, seed=1)
    both = Tokens.cat([short, long])
    assert both.lengths.tolist() == [2, 5, 5]
    assert both[0].prefix(2) == short
    assert not getattr(both, kind)[0, 2:].any()
    assert both[1:] == long
    assert Tokens.cat([short, short]).lengths is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (in_kind("bits", 1, 5), "kind.*indices.*bits"),
        (example(sizes=(4096, 2)), r"shape of a token.*\[\].*\[2\]"),
        (example(sizes=(4097,)), r"codebook_sizes.*4096.*4097"),
        (example(name="titok-b64"), "tokenizer.*titok-l32.*titok-b64"),
    ],
)
def test_tokens_that_do_not_belong_together_are_not_joined(other, said):
    with pytest.raises(ValueError, match=f"one {said}"):
        Tokens.cat([example(), other])


def test_latents_of_two_dtypes_are_not_joined_and_nothing_is_not_a_batch():
    latents = in_kind("latents", 1, 2)
    with pytest.raises(ValueError, match=r"one dtype.*float32.*float16"):
        Tokens.cat([latents, latents.to(torch.float16)])
    with pytest.raises(ValueError, match="at least one"):
        Tokens.cat([])
    with pytest.raises(TypeError, match="joins Tokens; a Tensor was given"):
        Tokens.cat([latents, torch.zeros(1, 2)])


# Equality, representation, conversion -----------------------------------------------------------------------


def test_equality_sees_every_difference():
    tokens = example(lengths=[5, 2, 3])
    assert tokens == example(lengths=[5, 2, 3])
    changed = tokens.indices.clone()
    changed[0, 0] ^= 1
    others = [
        Tokens(indices=changed, lengths=tokens.lengths, tokenizer="titok-l32", codebook_sizes=(4096,)),
        example(lengths=[5, 2, 4]),
        example(lengths=[5, 2, 3], name=None),
        example(lengths=[5, 2, 3], sizes=(4095,)),
        tokens[:2],
        tokens.prefix(4),
    ]
    assert not any(tokens == other for other in others)
    assert tokens != "tokens"


def test_an_axis_of_one_codebook_is_not_the_same_as_none():
    flat = Tokens(indices=torch.zeros(1, 2, dtype=torch.int64), codebook_sizes=(4,))
    assert flat != Tokens(indices=torch.zeros(1, 2, 1, dtype=torch.int64), codebook_sizes=(4,))


@KINDS
def test_padding_counts_for_nothing(kind):
    data = getattr(in_kind(kind, 2, 4), kind)
    other = data.clone()
    other[0, 1:] = data[1, 1:].logical_not() if kind == "bits" else data[1, 1:] + 1
    sizes, lengths = (10**4, 10) if kind == "indices" else None, torch.tensor([1, 4])
    pair = [Tokens(**{kind: values}, lengths=lengths, codebook_sizes=sizes) for values in (data, other)]
    assert pair[0] == pair[1]
    assert pair[0].to_bytes() == pair[1].to_bytes()
    assert not getattr(pair[1], kind)[0, 1:].any()
    assert torch.equal(getattr(pair[1], kind)[1], data[1])


def test_lengths_that_are_all_full_equal_no_lengths():
    assert example(lengths=[5, 5, 5]) == example()
    assert example(lengths=[5, 5, 4]) != example()


def test_negative_zero_differs_from_zero():
    zero = torch.zeros(1, 1, 1)
    assert Tokens(latents=zero) != Tokens(latents=-zero)


def test_a_grid_follows_its_tokens_and_comes_back_from_a_file(tmp_path):
    tokens = Tokens(indices=torch.arange(24).view(2, 12), codebook_sizes=(32,), grid=[3, 4])
    assert tokens.grid == (3, 4) and "grid=(3, 4)" in repr(tokens)
    tokens.save(tmp_path / "grid.vtok")
    loaded = Tokens.load(tmp_path / "grid.vtok")
    assert loaded == tokens and loaded.grid == (3, 4)
    assert loaded[1:].grid == loaded.to("cpu").grid == loaded.prefix(12).grid == (3, 4)
    assert loaded.prefix(8).grid is None
    assert Tokens.cat([loaded[:1], loaded[1:]]) == tokens
    assert tokens != dataclasses.replace(tokens, grid=None) != dataclasses.replace(tokens, grid=(4, 3))
    with pytest.raises(ValueError, match=r"parts of one grid: part 0 has \(3, 4\), part 1 \(4, 3\)"):
        Tokens.cat([tokens, dataclasses.replace(tokens, grid=(4, 3))])
    video = dataclasses.replace(tokens, grid=(2, 1, 3), names=("a", "b"))  # two tokens for each place
    assert Tokens.from_bytes(video.to_bytes()).grid == (2, 1, 3)
    assert Tokens.from_bytes(video.to_bytes()).names == ("a", "b")


@pytest.mark.parametrize("grid", [(), (5,), (0, 12), (3, -4), (3.0, 4)])
def test_a_grid_has_sides_that_its_tokens_fill(grid):
    with pytest.raises((ValueError, TypeError), match=r"grid|integer"):
        Tokens(indices=torch.zeros(1, 12, dtype=torch.int64), grid=grid)


def test_a_file_with_a_grid_is_of_version_3_and_its_header_is_checked():
    data = Tokens(indices=torch.zeros(1, 4, dtype=torch.int64), codebook_sizes=(2,), grid=(2, 2)).to_bytes()
    assert data[4] == 3
    start = data.index(bytes([2, 2, 2]))  # two sides of two
    for sides in ([9, 2, 2], [0, 2, 2], [2, 2, 3]):
        content = data[6:start] + bytes(sides) + data[start + 3 : -4]
        with pytest.raises(ValueError, match="grid"):
            Tokens.from_bytes(seal(content, version=3))


def test_the_representation_names_kind_shape_and_origin_but_no_values():
    assert repr(example(lengths=[1, 2, 3])) == (
        "Tokens(indices=int64 [3, 5], lengths=int64 [3], tokenizer='titok-l32', codebook_sizes=(4096,), "
        "device='cpu')"
    )


def test_only_latents_change_dtype_and_lengths_move_along():
    latents = Tokens(latents=torch.randn(2, 3, 4), lengths=torch.tensor([3, 1]))
    half = latents.to(torch.bfloat16)
    assert half.latents.dtype == torch.bfloat16
    assert half.lengths.tolist() == [3, 1]
    moved = latents.to("meta")
    assert moved.latents.is_meta
    assert moved.lengths.is_meta
    with pytest.raises(ValueError, match="only latents change dtype; these Tokens hold indices"):
        example().to(torch.float16)


def test_tokens_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        example().tokenizer = "another"


# What is refused --------------------------------------------------------------------------------------------

ZEROS = torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "nothing": ({}, ValueError, "exactly one of indices, bits, latents; got none"),
    "two kinds": (
        {"indices": ZEROS, "latents": torch.zeros(2, 3, 1)},
        ValueError,
        "exactly one of .*; got indices and latents",
    ),
    "array": ({"indices": ZEROS.numpy()}, TypeError, r"indices as a torch\.Tensor; got ndarray"),
    "listed lengths": (
        {"indices": ZEROS, "lengths": [1, 2]},
        TypeError,
        "lengths as a torch.Tensor; got list",
    ),
    "numbered tokenizer": ({"indices": ZEROS, "tokenizer": 3}, TypeError, "as a str; got int"),
    "int32 indices": ({"indices": ZEROS.int()}, ValueError, r"indices as torch\.int64; got torch\.int32"),
    "bits as numbers": (
        {"bits": torch.zeros(2, 3, 1)},
        ValueError,
        r"bits as torch\.bool; got torch\.float32",
    ),
    "latents as integers": ({"latents": ZEROS[..., None]}, ValueError, r"float16.*float64; got torch\.int64"),
    "flat indices": ({"indices": ZEROS[0]}, ValueError, r"\[B, K\] or \[B, K, Q\].*got \[3\]"),
    "deep indices": ({"indices": ZEROS[None, None]}, ValueError, r"got \[1, 1, 2, 3\]"),
    "no codebook": ({"indices": ZEROS[..., None][..., :0]}, ValueError, r"not empty; got \[2, 3, 0\]"),
    "flat bits": ({"bits": ZEROS.bool()}, ValueError, r"bits as \[B, K, D\].*got \[2, 3\]"),
    "no channels": ({"latents": torch.zeros(2, 3, 0)}, ValueError, r"not empty; got \[2, 3, 0\]"),
    "lengths of another batch": (
        {"indices": ZEROS, "lengths": torch.ones(3, dtype=torch.int64)},
        ValueError,
        r"int64 \[B\], here \[2\]; got torch\.int64 \[3\]",
    ),
    "float lengths": ({"indices": ZEROS, "lengths": torch.ones(2)}, ValueError, r"got torch\.float32 \[2\]"),
    "lengths elsewhere": (
        {"indices": ZEROS, "lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        ValueError,
        "lengths are on meta, indices on cpu: move one",
    ),
    "sizes of bits": (
        {"bits": torch.zeros(1, 1, 1).bool(), "codebook_sizes": (2,)},
        ValueError,
        "codebook_sizes describe indices; these Tokens hold bits",
    ),
    "bare size": ({"indices": ZEROS, "codebook_sizes": 4096}, TypeError, "as a tuple.*got 4096"),
    "too many sizes": ({"indices": ZEROS, "codebook_sizes": (2, 3)}, ValueError, r"1 here.*got \(2, 3\)"),
    "empty codebook": ({"indices": ZEROS, "codebook_sizes": (0,)}, ValueError, r"1\.\.2\*\*63; got \(0,\)"),
}


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_are_no_tokens_are_refused_in_words(fields, error, message):
    with pytest.raises(error, match=message):
        Tokens(**fields)


@pytest.mark.parametrize("value", [4096, -1])
@pytest.mark.parametrize("use", [Tokens.validate, Tokens.to_bytes])
def test_an_index_outside_its_codebook_is_named_with_the_codebook(use, value):
    indices = torch.zeros(2, 3, 2, dtype=torch.int64)
    indices[1, 2, 1] = value
    with pytest.raises(ValueError, match=rf"index {value} is outside 0\.\.4095 \(codebook 1 of size 4096\)"):
        use(Tokens(indices=indices, codebook_sizes=(8192, 4096)))


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_outside_the_tokens_is_named(length):
    with pytest.raises(ValueError, match=rf"length {length} is outside 0\.\.3 \(3 tokens per image\)"):
        Tokens(indices=ZEROS, lengths=torch.tensor([1, length])).validate()


def test_indices_without_codebook_sizes_may_be_any_but_negative():
    Tokens(indices=ZEROS + 2**62).validate()
    with pytest.raises(ValueError, match="index -1 is outside"):
        Tokens(indices=ZEROS - 1).validate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@KINDS
def test_tokens_on_a_gpu_equal_and_pack_like_those_on_the_cpu(kind):
    tokens = Tokens.cat([in_kind(kind, 2, 5), in_kind(kind, 1, 3)])
    moved = tokens.to("cuda")
    assert moved.device.type == "cuda"
    assert moved == tokens
    assert moved[[2, 0]].prefix(4) == tokens[[2, 0]].prefix(4)
    assert moved.to_bytes() == tokens.to_bytes()
