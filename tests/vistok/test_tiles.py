"""Pictures of any size in tiles: geometry, borders, tokens, files and the command line."""

import dataclasses
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import CASES, SIDE, codes_of, decode, options, shared, text_states, traits

import vistok
from vistok import Tokens
from vistok.packing import seal, varint
from vistok.tile_layout import TileLayout
from vistok.tiles import decode_tiles, encode_tiles

OF_IMAGES = [case for case in CASES if traits(case).modality == "image"]
pytestmark = pytest.mark.usefixtures("small_and_quick")
ASSETS = Path(str(files("vistok.assets")))
PHOTOS = [ASSETS / f"{name}.jpg" for name in ("astronaut", "camera", "chelsea", "coffee")]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A picture [1, 3, height, width] without detail finer than 16 pixels."""
    coarse = noise(1, 3, -(-height // 16) + 1, -(-width // 16) + 1, seed=seed)
    return F.interpolate(coarse, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


class Lossless:
    """A tokenizer whose tokens are the pixels of images of 32×32, brightened by the `offset` of each tile."""

    image_size, num_tokens, label, conditions = 32, 1, "lossless", ()

    def __init__(self, offset=lambda number: 0.0):
        self.offset, self.decoded, self.largest = offset, 0, 0

    def check_pixels(self, images, advice):
        shared("mini").check_pixels(images, advice)

    def encode(self, images, num_tokens=None):
        self.largest = max(self.largest, len(images))
        return Tokens(latents=images.flatten(1).unsqueeze(1))

    def decode(self, tokens):
        offsets = [self.offset(self.decoded + number) for number in range(len(tokens))]
        self.decoded, self.largest = self.decoded + len(tokens), max(self.largest, len(tokens))
        return tokens.latents.unflatten(2, (3, 32, 32)).squeeze(1) + torch.tensor(offsets).view(-1, 1, 1, 1)


# Geometry ---------------------------------------------------------------------------------------------------


def test_a_photograph_of_1024_by_768_is_48_tiles_at_any_number_of_tokens():
    model = vistok.load("vistok-mini")
    photo = smooth(768, 1024)
    tokens = model.encode_tiles(photo, 16)
    assert (tokens.grid, len(tokens), tokens.num_tokens) == ((6, 8), 1, 16)
    assert tokens.tiles.sizes == ((768, 1024),) and tokens.indices.shape == (48, 16)
    assert tokens.bits_per_image.tolist() == [48 * 16 * 16]
    pictures = model.decode(tokens.prefix(4))
    assert pictures.shape == photo.shape and tokens.prefix(4).grid == (6, 8)
    assert pictures.min() >= 0 and pictures.max() <= 1


@pytest.mark.parametrize("case", OF_IMAGES)
def test_every_tokenizer_codes_a_picture_of_another_size(case):
    model = shared(case)
    tokens = model.encode_tiles([noise(3, 20, 40), noise(3, 33, 20, seed=1)], batch_size=3)
    assert len(tokens) == 2 and tokens.tiles.grids == ((1, 2), (2, 1)) and tokens.grid is None
    assert len(codes_of(tokens)) == 4 and tokens.tokenizer == model.name
    pictures = decode(model, case, tokens)
    assert [tuple(picture.shape) for picture in pictures] == [(3, 20, 40), (3, 33, 20)]
    again = model.decode(tokens, **options(case, 2), batch_size=3)
    for picture, other in zip(pictures, again, strict=True):
        torch.testing.assert_close(picture, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", OF_IMAGES)
def test_a_picture_of_the_own_size_is_coded_as_by_encode(case):
    model, picture = shared(case), noise(1, 3, SIDE, SIDE)
    tokens, plain = model.encode_tiles(picture), model.encode(picture)
    assert torch.equal(codes_of(tokens), codes_of(plain)) and tokens.grid == (1, 1)
    torch.testing.assert_close(decode(model, case, tokens), decode(model, case, plain), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 6), st.sampled_from([None, 0, 2, 32]))
@example(1, 1, 6, None)
@example(127, 129, 6, None)
@example(3000, 17, 1, None)
@example(17, 3000, 1, 0)
@example(32, 33, 6, 32)
def test_any_size_comes_back_through_tokens_and_their_file(height, width, count, overlap):
    model = shared("mini")
    picture = noise(1, 3, height, width)
    tokens = model.encode_tiles(picture, count, overlap=overlap, batch_size=64)
    assert tokens.grid == (-(-height // SIDE), -(-width // SIDE))
    assert int(tokens.bits_per_image[0]) == tokens.grid[0] * tokens.grid[1] * count * 4
    restored = Tokens.from_bytes(tokens.to_bytes())
    assert restored == tokens and restored.tiles == tokens.tiles and restored.grid == tokens.grid
    pictures = model.decode(restored, batch_size=64)
    assert pictures.shape == picture.shape and pictures.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (100, 64), (5, 200)])
def test_tiles_without_overlap_lose_nothing_by_themselves(size):
    picture = noise(1, 3, *size)
    tokenizer = Lossless()
    tokens = encode_tiles(tokenizer, picture, overlap=0)
    assert torch.equal(decode_tiles(tokenizer, tokens), picture)


@pytest.mark.parametrize("overlap", [None, 2, 8, 16, 32])
@pytest.mark.parametrize("size", [(96, 96), (75, 130)])
def test_overlapping_tiles_lose_no_more_than_their_resizing(overlap, size):
    tokenizer, picture = Lossless(), smooth(*size)
    restored = decode_tiles(tokenizer, encode_tiles(tokenizer, picture, overlap=overlap))
    assert (restored - picture).abs().max() < 0.02
    grey = torch.full((1, 3, *size), 0.25)
    flat = decode_tiles(tokenizer, encode_tiles(tokenizer, grey, overlap=overlap))
    torch.testing.assert_close(flat, grey, rtol=0, atol=1e-5)


def test_beyond_the_picture_its_edge_continues():
    picture = noise(1, 3, 20, 30)
    tile = encode_tiles(Lossless(), picture, overlap=0).latents.view(1, 3, 32, 32)
    assert torch.equal(tile, F.pad(picture, (0, 2, 0, 12), mode="replicate"))


def test_no_more_tiles_than_the_batch_size_are_in_work_at_a_time():
    tokenizer = Lossless()
    tokens = encode_tiles(tokenizer, smooth(300, 400), batch_size=5)
    decode_tiles(tokenizer, tokens, batch_size=5)
    assert tokens.tiles.total == 130 and tokenizer.largest == 5


# Borders ----------------------------------------------------------------------------------------------------


def test_a_difference_between_two_tiles_becomes_a_slope():
    """Tiles of one grey that come back brighter in turns."""
    grey = torch.full((1, 3, 64, 64), 0.5)
    steps = {}
    for overlap in (0, 4):
        tokenizer = Lossless(offset=lambda number: 0.1 * ((number // 2 + number) % 2))  # a chessboard
        picture = decode_tiles(tokenizer, encode_tiles(tokenizer, grey, overlap=overlap))
        steps[overlap] = max(float(picture.diff(dim=axis).abs().max()) for axis in (2, 3))
    assert steps[0] == pytest.approx(0.1, abs=1e-6) and steps[4] < 0.02


def squared_errors(model: vistok.Tokenizer, photo: torch.Tensor, shift: int) -> torch.Tensor:
    """Squared error of every pixel [H, W] when the tiles begin `shift` pixels before the photograph."""
    padded = F.pad(photo, (shift, 0, shift, 0), mode="reflect")
    decoded = model.decode(model.encode_tiles(padded))[:, :, shift:, shift:]
    return (decoded - photo).square().mean((0, 1))


def test_photographs_have_no_more_error_along_borders_than_the_same_pixels_inside_a_tile():
    """Within 4 pixels of a border, in the shipped photographs at their own sizes."""
    model, bands, inside = vistok.load("vistok-mini"), 0.0, 0.0
    for path in PHOTOS[2:]:
        photo = vistok.to_tensor(path, None)
        positions = [torch.arange(side) for side in photo.shape[2:]]
        rows, columns = (((line + 4) % 128 < 8) & (line >= 124) for line in positions)
        band = rows[:, None] | columns
        bands += float(squared_errors(model, photo, 0)[band].sum())
        inside += float(squared_errors(model, photo, 64)[band].sum())
    assert bands <= 1.1 * inside


# Tokens -----------------------------------------------------------------------------------------------------


def test_pictures_of_several_sizes_are_one_batch_and_each_comes_back_alone():
    model = shared("mini")
    pictures = [noise(3, 40, 70), noise(3, 10, 12, seed=1), noise(3, 64, 32, seed=2)]
    tokens = dataclasses.replace(model.encode_tiles(pictures), names=("a", "b", "c"))
    together = model.decode(tokens)
    assert len(tokens) == 3 and tokens.grid is None and [len(each) for each in tokens] == [1, 1, 1]
    for number, picture in enumerate(pictures):
        alone = model.encode_tiles(picture[None])
        assert tokens[number] == alone and tokens[number].names == ("abc"[number],)
        torch.testing.assert_close(model.decode(alone)[0], together[number], rtol=1e-5, atol=1e-5)
    picked = tokens[[2, 0]]
    assert picked.tiles.sizes == ((64, 32), (40, 70)) and picked.names == ("c", "a")
    assert Tokens.cat([tokens[2], tokens[0]]) == picked == tokens[torch.tensor([2, 0])]
    assert tokens[[False, True, False]] == tokens[1:2] and len(tokens[3:]) == 0
    assert model.decode(tokens[3:]).shape == (0, 3, SIDE, SIDE)
    assert tokens.to("cpu").tiles == tokens.tiles and tokens.prefix(2).tiles == tokens.tiles
    assert len(model.encode_tiles([])) == 0


def test_a_batch_of_one_size_comes_back_as_one_tensor():
    model, pictures = shared("mini"), noise(2, 3, 40, 50)
    tokens = model.encode_tiles(pictures)
    assert tokens.grid == (2, 2) and model.decode(tokens).shape == pictures.shape


def test_pictures_of_other_sizes_or_tiles_are_other_tokens():
    model, picture = shared("mini"), noise(1, 3, 40, 40)
    tokens, cropped = model.encode_tiles(picture), model.encode_tiles(picture[..., :-1])
    assert tokens != dataclasses.replace(tokens, tiles=cropped.tiles)
    assert "sizes=((40, 40),)" in repr(tokens)
    with pytest.raises(ValueError, match="one kind of tiles: part 0 has 32 pixels, overlap 2"):
        Tokens.cat([tokens, model.encode_tiles(picture, overlap=0)])
    with pytest.raises(ValueError, match="one kind of tiles"):
        Tokens.cat([tokens, model.encode(picture[..., :32, :32])])


def test_each_tile_takes_the_tokens_that_it_needs():
    model = shared("mini")
    pictures = [torch.cat([torch.full((3, 32, 32), 0.5), noise(3, 32, 32)], 2), noise(3, 20, 20)]
    with pytest.warns(UserWarning, match=r"pictures do not reach 13 dB .*: lower target_psnr"):
        adaptive = model.encode_tiles(pictures, target_psnr=13.0)
    tokens = adaptive.tokens
    assert tokens.lengths.shape == (3,) and len(tokens) == 2
    for number, (picture, restored) in enumerate(zip(pictures, model.decode(tokens), strict=True)):
        psnr = -10 * (restored - picture).square().mean().log10()
        assert float(adaptive.psnr[number]) == pytest.approx(float(psnr), abs=1e-3)
    assert adaptive.reached.tolist() == (adaptive.psnr >= 13).tolist()
    assert Tokens.from_bytes(tokens.to_bytes()) == tokens
    assert tokens.bits_per_image.tolist() == [4 * int(tokens.lengths[:2].sum()), 4 * int(tokens.lengths[2])]


def test_an_adaptive_tokenizer_gives_tiles_different_lengths():
    model = shared("karl-vae-vq")
    tokens = model.encode_tiles(noise(1, 3, 64, 96), target=0.2, batch_size=4)
    assert tokens.lengths.shape == (6,) and len(set(tokens.lengths.tolist())) > 1
    assert model.decode(tokens).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("name", ["condition", "text"])
def test_a_caption_goes_to_every_tile_of_its_picture(name):
    model = shared("tatitok-vq")
    tokens = model.encode_tiles([noise(3, 40, 40), noise(3, 30, 70, seed=1)])
    states = text_states(2)
    together = model.decode(tokens, **{name: states}, batch_size=3)
    for number in range(2):
        alone = model.decode(tokens[number], **{name: states[number : number + 1]})[0]
        torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], model.decode(tokens[0], **{name: states[1:]})[0], atol=1e-4)
    with pytest.raises(ValueError, match=f"3 values were given as {name} for 2 pictures"):
        model.decode(tokens, **{name: text_states(3)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pictures_come_back_in_the_dtype_of_the_model(dtype):
    model = vistok.create("mini", **CASES["mini"][1]).eval().to(dtype)
    tokens = model.encode_tiles(noise(1, 3, 40, 40))
    assert model.decode(tokens).dtype == dtype
    assert len(model.encode_tiles(noise(1, 3, 40, 40).to(dtype))) == 1


# What is refused --------------------------------------------------------------------------------------------

PICTURE = torch.zeros(1, 3, 40, 40)
REFUSED = {
    "one picture without a batch": (
        PICTURE[0],
        {},
        r"shape \[3, 40, 40\].*vistok.to_tensor\(photo, size=None\)",
    ),
    "bytes": (PICTURE.byte(), {}, "uint8.*divide by 255"),
    "not a number": (PICTURE + torch.nan, {}, "without NaN"),
    "levels": ([PICTURE[0] + 200], {}, r"span \[200, 200\]"),
    "no pixels": (PICTURE[..., :0], {}, "have no pixels"),
    "a list of batches": ([PICTURE], {}, r"picture 0 of the list is \[1, 3, 40, 40\]"),
    "a list of names": (["a.jpg"], {}, "picture 0 of the list is str"),
    "a name": ("a.jpg", {}, "pictures are a str; .* takes a float tensor"),
    "odd overlap": (PICTURE, {"overlap": 3}, r"even number of pixels in 0\.\.32; got 3"),
    "wide overlap": (PICTURE, {"overlap": 34}, "got 34"),
    "no tiles at a time": (PICTURE, {"batch_size": 0}, "batch_size is 0"),
    "too many tokens": (PICTURE, {"num_tokens": 7}, "takes 1 to 6 tokens"),
}


@pytest.mark.parametrize(("images", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_picture_is_refused_in_words(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        shared("mini").encode_tiles(images, **arguments)


def test_encode_takes_its_own_size_only_and_names_the_way_for_others():
    with pytest.raises(ValueError, match=r"40×40 pixels; mini takes 32×32: .*, or encode_tiles for pictures"):
        shared("mini").encode(PICTURE)


def test_tokens_of_tiles_are_decoded_by_what_they_were_made_for():
    tokens = shared("mini").encode_tiles(PICTURE)
    larger = vistok.create("mini", **{**CASES["mini"][1], "image_size": 64})
    with pytest.raises(ValueError, match=r"tiles of 32×32 pixels; mini decodes 64×64"):
        larger.decode(tokens)
    with pytest.raises(ValueError, match="leave size out"):
        shared("karl-vae-vq").decode(shared("karl-vae-vq").encode_tiles(PICTURE), size=64)
    with pytest.raises(ValueError, match="pictures in tiles, which decode joins"):
        shared("mini").dequantize(tokens)
    with pytest.raises(ValueError, match="use decode"):
        decode_tiles(shared("mini"), shared("mini").encode(PICTURE[..., :32, :32]))
    with pytest.raises(ValueError, match="steps and guidance do not apply"):
        shared("mini").decode(tokens, steps=3)


@pytest.mark.parametrize(
    ("sizes", "side", "overlap"),
    [
        (((0, 4),), 8, 0),
        (((4,),), 8, 0),
        ((4, 4), 8, 0),
        (((4, 4),), 0, 0),
        (((4, 4),), 8, -2),
        (((4.0, 4),), 8, 0),
    ],
)
def test_a_layout_has_sizes_of_pictures(sizes, side, overlap):
    with pytest.raises((ValueError, TypeError)):
        TileLayout(sizes, side, overlap)


def test_the_rows_of_tokens_are_the_tiles_of_their_layout():
    indices = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="one row per tile, 6 for these 1 pictures; got 4"):
        Tokens(indices=indices, tiles=TileLayout(((60, 90),), 32))
    with pytest.raises(ValueError, match=r"have the grid \(2, 2\); got \(4, 1\)"):
        Tokens(indices=indices, tiles=TileLayout(((60, 60),), 32), grid=(4, 1))
    with pytest.raises(TypeError, match="tiles as a TileLayout; got tuple"):
        Tokens(indices=indices, tiles=(2, 2))
    with pytest.raises(ValueError, match=r"lengths as int64 \[B\], here \[4\]"):
        Tokens(indices=indices, tiles=TileLayout(((60, 60),), 32), lengths=torch.tensor([2]))


# Files ------------------------------------------------------------------------------------------------------


def coded() -> Tokens:
    """Two pictures in 4 and 1 tiles of 32 pixels that overlap by 2, of 3 tokens each."""
    indices = torch.arange(15).view(5, 3) % 7
    return Tokens(
        indices=indices, codebook_sizes=(7,), names=("a", "b"), tiles=TileLayout(((60, 50), (3, 4)), 32, 2)
    )


def test_sizes_and_grid_come_back_from_a_file(tmp_path):
    tokens = coded()
    tokens.save(tmp_path / "two.vtok")
    loaded = Tokens.load(tmp_path / "two.vtok")
    assert loaded == tokens and loaded.tiles == tokens.tiles and loaded.names == ("a", "b")
    assert loaded[0].grid == (2, 2)
    assert len(tokens.to_bytes()) < 50


LAYOUT = bytes([32, 2, 2, 60, 50, 3, 4])  # side, overlap, number of pictures, their sizes
FORGED = {
    "another picture's size": (bytes([32, 2, 2, 60, 70, 3, 4]), "it has 5 tiles, and pictures .* have 7"),
    "a picture too few": (bytes([32, 2, 1, 60, 50]), "it has 5 tiles, and pictures .* have 4"),
    "no side": (bytes([0, 2, 2, 60, 50, 3, 4]), "a side of 1 pixel or more; got 0"),
    "no height": (bytes([32, 2, 2, 0, 50, 3, 4]), "sides of a picture are 1 pixel or more; got 0×50"),
    "odd overlap": (bytes([32, 3, 2, 60, 50, 3, 4]), "even number of pixels"),
    "a vast picture": (bytes([32, 2, 1]) + varint(2**60) + varint(2**60), "it has 5 tiles, and"),
    "a vast number of pictures": (bytes([32, 2]) + varint(2**60) + bytes([60, 50, 3, 4]), "corrupt"),
}


@pytest.mark.parametrize(("layout", "message"), FORGED.values(), ids=FORGED)
def test_a_forged_layout_with_a_right_checksum_is_not_believed(layout, message):
    data = coded().to_bytes()
    version, start = data[4], data.index(LAYOUT)
    with pytest.raises(ValueError, match=message):
        Tokens.from_bytes(seal(data[6:start] + layout + data[start + len(LAYOUT) : -4], version=version))


def test_a_truncated_file_of_tiles_is_refused():
    data = coded().to_bytes()
    for end in range(5, len(data)):
        with pytest.raises(ValueError, match="truncated"):
            Tokens.from_bytes(data[:end])


# Command line -----------------------------------------------------------------------------------------------


def save_photo(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.open(PHOTOS[0]).resize((width, height)).save(path)
    return path


def test_a_photograph_keeps_its_size_on_the_command_line(run, tmp_path):
    status, out, err = run("encode", PHOTOS[2], "-o", "cat.vtok", "--tokens", 16)
    assert status == 0, err
    assert "cat.vtok: 1 image in 12 tiles of 128×128, 16 tokens per tile" in out
    assert f"451×300  12 tiles   192 tokens  {PHOTOS[2]}" in out
    tokens = Tokens.load(tmp_path / "cat.vtok")
    model = vistok.load("vistok-mini")
    photo = vistok.to_tensor(PHOTOS[2], None)
    assert tokens == model.encode_tiles(photo, 16, batch_size=8) and tokens.grid == (3, 4)
    status, out, _ = run("decode", "cat.vtok", "-o", "back")
    picture = Image.open(tmp_path / "back" / "chelsea.png")
    assert status == 0 and picture.size == (451, 300)
    assert picture.tobytes() == vistok.to_pil(model.decode(tokens, batch_size=8))[0].tobytes()


def test_pictures_of_many_sizes_go_into_one_file_and_come_back(run, tmp_path):
    sizes = {"a.png": (300, 200), "b.png": (128, 128), "c.png": (5, 7), "d.png": (130, 20), "e.png": (1, 1)}
    for name, size in sizes.items():
        save_photo(tmp_path / "photos" / name, *size)
    (tmp_path / "photos" / "broken.png").write_bytes((tmp_path / "photos" / "a.png").read_bytes()[:500])
    status, out, err = run("encode", "photos", "-o", "all.vtok", "--batch-size", 3, "--tokens", 4)
    assert status == 1 and "broken.png" in err and "1 image skipped" in err
    assert "5 images in 11 tiles of 128×128, 4 tokens per tile" in out
    for batch_size in (1, 100):
        folder = f"back-{batch_size}"
        status, _, err = run("decode", "all.vtok", "-o", folder, "--batch-size", batch_size)
        assert status == 0, err
        assert {path.name: Image.open(path).size for path in (tmp_path / folder).iterdir()} == sizes


def test_pictures_of_the_own_size_are_plain_tokens(run, tmp_path):
    for name in ("a.png", "b.png"):
        save_photo(tmp_path / "photos" / name, 128, 128)
    status, out, _ = run("encode", "photos", "-o", "two.vtok")
    tokens = Tokens.load(tmp_path / "two.vtok")
    assert status == 0 and "2 images, 64 tokens per image" in out and tokens.tiles is None
    pixels = torch.cat([vistok.to_tensor(tmp_path / "photos" / name, None) for name in ("a.png", "b.png")])
    assert tokens == vistok.load("vistok-mini").encode(pixels)


def test_resize_makes_one_tile_of_a_photograph(run, tmp_path):
    status, out, _ = run("encode", PHOTOS[3], "-o", "small.vtok", "--resize")
    tokens = Tokens.load(tmp_path / "small.vtok")
    assert status == 0 and "1 image resized to 128×128, 64 tokens per image" in out
    assert tokens == vistok.load("vistok-mini").encode(vistok.to_tensor(PHOTOS[3], 128))


def test_a_quality_is_reached_by_tiles_of_different_lengths(run, tmp_path):
    photo = save_photo(tmp_path / "photos" / "a.png", 200, 100)
    model, picture = vistok.load("vistok-mini"), vistok.to_tensor(photo, None)
    most = -10 * (model.decode(model.encode_tiles(picture)) - picture).square().mean().log10()
    target = round(float(most) - 1, 2)
    status, out, _ = run("encode", photo, "-o", "a.vtok", "--target-psnr", target)
    tokens = Tokens.load(tmp_path / "a.vtok")
    adaptive = model.encode_tiles(picture, target_psnr=target)
    assert status == 0 and tokens == adaptive.tokens and len(set(tokens.lengths.tolist())) > 1
    assert adaptive.reached.tolist() == [True] and "not reached" not in out
    least, most = int(tokens.lengths.min()), int(tokens.lengths.max())
    assert f"{least} to {most} (mean" in out and f"{float(adaptive.psnr[0]):.2f} dB" in out
    assert f"{int(tokens.lengths.sum()):4d} tokens" in out
    status, out, err = run("encode", photo, "-o", "a.vtok", "--target-psnr", 60)
    assert (
        status == 0 and "not reached" in out and err.startswith("warning: 1 of 1 image did not reach 60 dB")
    )


def test_a_file_for_another_size_of_tile_is_one_line_of_advice(run, tmp_path):
    tokens = vistok.load("vistok-mini").encode_tiles(smooth(130, 130))
    dataclasses.replace(tokens, tiles=TileLayout(((200, 200),), 100, 0), tokenizer="vistok-mini").save(
        tmp_path / "odd.vtok"
    )
    status, _, err = run("decode", "odd.vtok")
    assert status == 1 and "tiles of 100×100 pixels; vistok-mini decodes 128×128" in err


def test_tokenizers_of_videos_are_not_coded_in_tiles():
    with pytest.raises(ValueError, match=r"cvivit tokenizes videos \[B, T, 3, H, W\]; coding in tiles takes"):
        shared("cvivit").encode_tiles(noise(1, 3, SIDE, SIDE))
