"""Greys of 16 bits keep their range, what has no white is refused, and EXIF's orientation is followed if asked."""

import importlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tiny_sets
import torch
from conftest import error_of, read_log, settings, write_images
from PIL import Image, PngImagePlugin

import datasets
import main as script
from images import opening
from images.batches import train_batches
from images.cache import cache_images
from images.images import BadImage, Images
from images.order import TrainBatches

EIGHT = np.arange(256, dtype=np.uint16).reshape(16, 16)
DEEP = EIGHT * 257  # the same greys in 16 bits
RGB_DEEP = np.stack([DEEP, DEEP[::-1], DEEP.T], axis=-1)


def saved(array, kind, mode=None, **options):
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, kind, **options)
    return stream.getvalue()


def png(array, colour_type):
    """A PNG of 16 bits a sample, which Pillow writes for grey alone."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def retagged(content, tag, value, now):
    """A little-endian TIFF with another value for a tag of one short number."""
    before, after = (struct.pack("<HHIHH", tag, 3, 1, number, 0) for number in (value, now))
    assert content.count(before) == 1
    return content.replace(before, after)


def twelve_bits():
    """The greys as a TIFF of 12 bits a sample, two samples in three bytes."""
    pairs = (EIGHT.astype(int) * 4095 // 255).reshape(-1, 2).tolist()
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    content = retagged(saved(DEEP, "TIFF"), 258, 16, 12)
    return content.replace(DEEP.tobytes(), packed.ljust(len(DEEP.tobytes()), b"\0"))


GREY = {
    "png": saved(DEEP, "PNG"),
    "png with alpha": png(np.stack([DEEP, np.full_like(DEEP, 65535)], axis=-1).reshape(16, 16, 2), 4),
    "tiff": saved(DEEP, "TIFF"),
    "tiff of lzw": saved(DEEP, "TIFF", compression="tiff_lzw"),
    "tiff of 12 bits": twelve_bits(),
    "tiff with white at 0": retagged(saved(65535 - DEEP, "TIFF"), 262, 1, 0),
    "big-endian tiff": saved(DEEP.astype(">u2"), "TIFF"),
    "jpeg 2000": saved(DEEP, "JPEG2000"),
    "pgm": b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "pgm of 10 bits": b"P5 16 16 1023\n" + (EIGHT.astype(int) * 1023 // 255).astype(">u2").tobytes(),
    "plain pgm": b"P2 16 16 65535\n" + " ".join(map(str, DEEP.ravel())).encode(),
}
WITHOUT_WHITE = {
    "mode I, 32-bit": saved(EIGHT.astype(np.int32), "TIFF"),  # the values fit into 8 bits, which must not matter
    "mode I, signed 16-bit": saved(DEEP, "TIFF", tiffinfo={339: 2}),
    "mode F, floats": saved(EIGHT.astype(np.float32), "TIFF"),
}


def read(content, folder, name="image.png"):
    (folder / name).write_bytes(content)
    return np.asarray(Images("x", [0], paths=[folder / name])[0][0])


@pytest.mark.parametrize("name", GREY)
def test_deep_grey_is_scaled_to_eight_bits(name, tmp_path):
    assert (read(GREY[name], tmp_path) == EIGHT[..., None]).all()


def test_values_between_the_eight_bits_are_rounded(tmp_path):
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], dtype=np.uint16)  # 257 is one of 8 bits
    assert read(saved(values, "PNG"), tmp_path)[0, :, 0].tolist() == [0, 0, 1, 1, 2, 254, 255, 255]


def test_deep_grey_png_in_mode_i_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))  # as Pillow has it up to 10.2
    assert (read(GREY["png"], tmp_path) == EIGHT[..., None]).all()


def test_deep_colours_keep_their_upper_byte(tmp_path):
    assert (read(png(RGB_DEEP, 2), tmp_path) == RGB_DEEP >> 8).all()


@pytest.mark.parametrize("reason", WITHOUT_WHITE)
def test_image_without_a_white_is_named_with_its_mode(reason, tmp_path):
    with pytest.raises(BadImage, match=rf"^cannot read .*image\.png \({reason}: nothing says which value is white"):
        read(WITHOUT_WHITE[reason], tmp_path)


def test_images_in_memory_are_held_to_the_same():
    source = [(Image.fromarray(DEEP),), (Image.fromarray(EIGHT.astype(np.int32)),)]
    images = Images("set", [0, 1], source=source)
    assert (np.asarray(images[0][0]) == EIGHT[..., None]).all()
    with pytest.raises(BadImage, match=r"image 1 of set \(mode I, 32-bit"):
        images[1]


@pytest.fixture
def two_depths(tmp_path):
    """The same pictures in folders of 8 and of 16 bits."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for number in range(2 * count):
            grey = generator.integers(0, 256, (32, 32), dtype=np.uint8)
            for bits, array in (("8", grey), ("16", grey.astype(np.uint16) * 257)):
                folder = tmp_path / bits / part / "ab"[number % 2]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{number}.png")
    return tmp_path / "8", tmp_path / "16"


@pytest.mark.parametrize("way", ["", "--cache ram", "--augment device", "--augment device --cache device"])
def test_every_way_of_the_data_gives_the_same_for_both_depths(way, two_depths):
    batches = []
    for root in two_depths:
        images = datasets.load_images("image_folder", str(root), True)
        order = TrainBatches(16, batch_size=8, update_freq=1, world_size=1, rank=0, seed=0)
        batches.append(list(train_batches(images, order, *settings("--input_size", "32", *way.split()))))
    for (eight, _), (sixteen, _) in zip(*batches, strict=True):
        assert torch.equal(eight, sixteen)


def test_hugging_face_images_are_held_to_the_same(tmp_path):
    contents = [GREY["png"], saved(STORED, "JPEG", exif=TURNED), WITHOUT_WHITE["mode F, floats"]]
    tiny_sets.write_parquet(tmp_path / "set", contents=contents)
    images = datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), True)
    assert (np.asarray(images[0][0]) == EIGHT[..., None]).all()
    assert [each[1][0].size for each in (images, images.upright())] == [(40, 24), (24, 40)]
    with pytest.raises(BadImage, match=r"image 2 of hfds/.* \(mode F"):
        images[2]


# ---- orientation ----

STORED = np.zeros((24, 40, 3), dtype=np.uint8)
STORED[:, :20] = 255  # the left half is white
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned clockwise, the white half above


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_followed_only_if_asked(kind, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(saved(STORED, kind, exif=TURNED))
    images = Images("x", [0], paths=[tmp_path / "photo.jpg"])
    assert images[0][0].size == (40, 24) and np.abs(np.asarray(images[0][0], int) - STORED).max() < 20
    shown = np.asarray(images.upright()[0][0], int)
    assert np.abs(shown - np.rot90(STORED, -1)).max() < 20
    cached = cache_images(images.upright())
    assert (np.asarray(cached[0][0]) == shown).all() and cached.shapes.tolist() == [[40, 24]]


def test_deep_grey_is_turned_too(tmp_path):
    (tmp_path / "scan.png").write_bytes(saved(DEEP, "PNG", exif=TURNED))
    turned = Images("x", [0], paths=[tmp_path / "scan.png"]).upright()[0][0]
    assert (np.asarray(turned)[..., 0] == np.rot90(EIGHT, -1)).all()


@pytest.mark.parametrize("way", ["", "--augment device"])
def test_run_with_exif_equals_one_on_turned_files(way, tiny_run, tmp_path):
    generator, logs = np.random.default_rng(0), []
    for number in range(24):
        array = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        for name, stored, exif in (("tagged", array, TURNED), ("turned", np.rot90(array, -1).copy(), None)):
            folder = tmp_path / name / ("train" if number < 16 else "val") / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(saved(stored, "PNG", **({"exif": exif} if exif else {})))
    for name, exif in (("tagged", "true"), ("turned", "false"), ("tagged", "false")):
        words = ["--data_path", tmp_path / name, "--exif", exif, "--epochs 1 --warmup_epochs 0", way]
        script.main(tiny_run(*words, output_dir=tmp_path / f"run {name} {exif}"))
        logs.append(read_log(tmp_path / f"run {name} {exif}")[0]["train_loss"])
    assert logs[0] == logs[1] != logs[2]
    resumed = tiny_run(*words, "--epochs 2 --exif true", output_dir=tmp_path / "run tagged false")
    assert "--exif was False, is True" in error_of(script, *resumed)


def test_transparent_palettes_are_read_without_a_warning(tmp_path, recwarn):
    importlib.reload(opening)  # pytest has reset the filters of warnings
    palette = Image.fromarray(EIGHT.astype(np.uint8)).convert("P")
    palette.save(tmp_path / "image.png", transparency=bytes(range(256)))
    image, _ = Images("x", [0], paths=[tmp_path / "image.png"])[0]
    assert np.array_equal(np.asarray(image)[..., 0], EIGHT) and not recwarn
    warnings.warn("another", UserWarning, stacklevel=1)
    assert len(recwarn) == 1


# ---- size ----


@pytest.mark.parametrize("most", [200, 100])  # Pillow warns of more pixels than that, and refuses twice as many
def test_too_many_pixels_are_refused_before_decoding(most, tmp_path, monkeypatch):
    importlib.reload(opening)  # pytest has reset the filter of warnings
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    content = saved(EIGHT.astype(np.uint8), "PNG")[:60]  # decoding it would be another error
    with pytest.raises(
        BadImage, match=r"image\.png \(Image size \(256 pixels\) exceeds limit of 200 pixels; shrink it"
    ):
        read(content, tmp_path)


def test_skipped_instead_like_any_bad_image(tmp_path, caplog):
    write_images(tmp_path, "train", {"a": 2, "b": 2})
    (tmp_path / "train" / "a" / "000.jpg").write_bytes(WITHOUT_WHITE["mode F, floats"])
    images = datasets.load_images("image_folder", str(tmp_path), True).skipping_bad()
    assert images[0][0].tobytes() == images[1][0].tobytes() and images.bad_images() == [0]
    assert "000.jpg (mode F, floats: nothing says which value is white" in caplog.text
