"""Pictures come in upright and within limits; they go out whole or not at all."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ferrotype.runtime import pictures
from ferrotype.runtime.pictures import PictureError, check_free, open_picture, read_text, save_png

RED = Image.new("RGB", (8, 8), "red")


def refused(call, *args):
    with pytest.raises(PictureError) as caught:
        call(*args)
    assert str(caught.value).isprintable()
    return str(caught.value)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    """A PNG whose header claims a size and whose pixels are a few zeros."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


# --- in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_a_picture_of_every_kind_is_read(tmp_path, kind):
    RED.save(tmp_path / f"a.{kind}")
    opened = open_picture(tmp_path / f"a.{kind}")
    assert (opened.mode, opened.size) == ("RGB", (8, 8))
    np.testing.assert_allclose(np.asarray(opened)[3, 3], (255, 0, 0), atol=2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_white_is_white_and_black_is_black_in_every_mode(tmp_path, mode):
    values = np.array([[0, 255]], np.uint8)
    picture = Image.fromarray(values)
    picture = Image.fromarray(values * np.uint16(257)) if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / "a.png")
    found = open_picture(tmp_path / "a.png").convert("RGB")
    assert [found.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_sixteen_bits_of_gray_are_not_clipped_to_white(tmp_path):
    Image.fromarray(np.array([[0, 0x8000]], np.uint16)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((1, 0)) == (127, 127, 127)


def test_transparency_is_kept_in_every_form(tmp_path):
    for mode in ("RGBA", "LA", "P"):
        picture = Image.new(mode, (2, 2))
        if mode == "P":
            picture.info["transparency"] = 0
        picture.save(tmp_path / "a.png")
        assert np.asarray(open_picture(tmp_path / "a.png"))[0, 0, 3] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was(tmp_path, orientation):
    picture = Image.new("RGB", (16, 8), "blue")
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif)
    opened = open_picture(tmp_path / "a.jpg")
    assert opened.size == ((16, 8) if orientation < 5 else (8, 16))
    assert opened.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0II*\0" * 9]
)
def test_damaged_camera_data_is_refused_or_ignored(tmp_path, exif):
    RED.save(tmp_path / "a.jpg", exif=exif)
    try:
        open_picture(tmp_path / "a.jpg")
    except (PictureError, UserWarning) as error:
        assert "\n" not in str(error)  # noqa: PT017  # either is right


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe\n"]
)
def test_what_is_no_picture_is_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    refused(open_picture, tmp_path / "a.png")
    refused(read_text, tmp_path / "a.png")


def test_a_kind_that_would_start_another_program_is_refused(tmp_path):
    RED.save(tmp_path / "a.eps")
    assert "no picture of a known kind: PNG, JPEG" in refused(open_picture, tmp_path / "a.eps")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_truncated_picture_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    data = path.read_bytes()
    for end in range(0, len(data) * 9 // 10, len(data) // 20):
        path.write_bytes(data[:end])
        refused(open_picture, path)


def test_a_changed_byte_is_refused_or_read(tmp_path):
    path = tmp_path / "a.png"
    RED.save(path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(bytes([*data[:place], data[place] ^ 0xFF, *data[place + 1 :]]))
        try:
            open_picture(path)
        except PictureError as error:
            assert str(error).isprintable()  # noqa: PT017  # either is right


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))
    assert "pixels" in refused(open_picture, tmp_path / "a.png")


def test_a_text_bomb_is_refused(tmp_path):
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28)))
    (tmp_path / "a.png").write_bytes(png(8, 1, text))
    refused(read_text, tmp_path / "a.png")


def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(open_picture, tmp_path / "pipe")
    assert "is not a file" in refused(open_picture, tmp_path)
    assert "is not there" in refused(open_picture, tmp_path / "missing.png")


# --- out ----------------------------------------------------------------------------------------

TEXT = {"prompt": "a 🦊 in the\nsnow", "seed": "7", "empty": "", "broken": "a\udcff b"}


def test_the_text_comes_back_from_the_png(tmp_path):
    save_png(RED, tmp_path / "a.png", TEXT)
    assert read_text(tmp_path / "a.png") == {**TEXT, "broken": "a? b"}
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_pictures_without_text_have_none(tmp_path):
    RED.save(tmp_path / "a.jpg")
    assert read_text(tmp_path / "a.jpg") == {}


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("mine")
    assert "exists: choose another name or pass --force" in refused(save_png, RED, path, {})
    assert path.read_text() == "mine"
    save_png(RED, path, {}, force=True)
    assert open_picture(path).size == (8, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_dangling_link_is_a_file_too(tmp_path):
    (tmp_path / "a.png").symlink_to("nowhere")
    assert "exists" in refused(save_png, RED, tmp_path / "a.png", {})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "is a folder"),
        ("no/a.png", "is not a folder: make it first"),
        ("file/a.png", "is not a folder"),
        (f"{'x' * 300}.png", "cannot be written: File name too long"),
        ("/proc/a.png", "cannot be written"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, words, force):
    (tmp_path / "file").write_text("")
    if not (force and len(name) > 255):  # with force only the attempt tells
        assert words in refused(check_free, tmp_path / name, force)
    assert words in refused(save_png, RED, tmp_path / name, {}, force)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_that_the_disk_takes_is_written(tmp_path):
    save_png(RED, tmp_path / f"{'x' * 251}.png", {})
    save_png(RED, tmp_path / f"{'🦊' * 62}.png", {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("old", [None, "mine"])
def test_nothing_is_left_of_a_write_that_stops(tmp_path, monkeypatch, error, old):
    def stop(self, stream, *args, **kwargs):
        stream.write(b"half")
        raise error

    path = tmp_path / "a.png"
    if old:
        path.write_text(old)
    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises((KeyboardInterrupt, PictureError)):
        save_png(RED, path, {}, force=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_new_file_has_the_rights_that_the_user_wants(tmp_path):
    mask = os.umask(0o027)
    try:
        save_png(RED, tmp_path / "a.png", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_a_sheet_holds_every_picture_in_its_place():
    sheet = pictures.contact_sheet([[RED, RED], [Image.new("RGB", (8, 8), "blue")]])
    assert sheet.size == (28, 28)
    assert [sheet.getpixel(p) for p in [(5, 5), (17, 5), (5, 17), (17, 17), (0, 0)]] == [
        (255, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip


def test_pillow_still_bounds_text():
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20
    assert PngImagePlugin.MAX_TEXT_MEMORY <= 1 << 26
