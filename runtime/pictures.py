"""Pictures in and out: PNG with the run's settings as text, whole or not at all."""

from __future__ import annotations

import math
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import FerrotypeError

T = TypeVar("T")

# Pillow knows more; its rarer decoders are less tried, and that of EPS starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64 << 20  # 256 MiB when decoded


class PictureError(FerrotypeError):
    """A picture cannot be read or may not be written."""


def save_png(image: Image.Image, path: Path, text: dict[str, str], force: bool = False) -> None:
    """Write a PNG with text chunks; it appears whole or not at all.

    Raises PictureError if the file exists and `force` is not set.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        # Half a surrogate pair, which an argument of broken UTF-8 turns into, has no bytes.
        info.add_itxt(key, value.encode("utf-8", "replace").decode())
    with new_file(path, force) as stream:
        image.save(stream, "PNG", pnginfo=info)


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A stream under a temporary name, renamed to `path` at the end, removed on an exception."""
    check_free(path, force)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as stream:
                yield stream
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from None


def check_free(path: Path, force: bool) -> None:
    """Raise PictureError if a file could not be written to `path` in the end."""
    try:
        if path.is_dir():
            raise PictureError(f"{path} is a folder: name a file in it")
        if not force and _taken(path):
            raise PictureError(f"{path} exists: choose another name or pass --force to replace it")
        if not path.parent.is_dir():
            raise PictureError(f"{path.parent} is not a folder: make it first")
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # only trying tells: rights do not bind root, nor do they say a disk is read-only
    except OSError as error:
        raise _cannot_write(path, error) from None


def _taken(path: Path) -> bool:
    try:
        path.lstat()  # exists() calls a dangling link and a name that is too long free
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _cannot_write(path: Path, error: OSError) -> PictureError:
    return PictureError(f"{path} cannot be written: {error.strerror or error}")


def open_picture(path: Path) -> Image.Image:
    """Read a picture, whole and upright, as RGB, or as RGBA where it is transparent.

    Raises PictureError if it is none, is truncated or is too large.
    """
    return _read(path, _plain)


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG; empty if it has none."""
    return _read(path, lambda image: {k: str(v) for k, v in getattr(image, "text", {}).items()})


def _read(path: Path, use: Callable[[Image.Image], T]) -> T:
    if not path.is_file():  # a pipe would wait for ever
        raise PictureError(f"{path} is not {'a file' if path.exists() else 'there'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(path, formats=FORMATS) as image:
                _check_pixels(image)
                image.load()
                return use(image)
    except UnidentifiedImageError:
        raise PictureError(f"{path} is no picture of a known kind: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise what their format's parser did
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{path} cannot be read as a picture: {reason}") from None


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels; scale it down"
        )


def _plain(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow would clip them to white
        gray = np.asarray(image).clip(0, 0xFFFF) // 257
        image = Image.fromarray(gray.astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def landscape(count: int) -> int:
    """How many of `count` pictures to put in a row: a sheet at least as wide as high, full rows."""
    least = math.ceil(math.sqrt(count))
    return min(range(least, 2 * least), key=lambda across: -count % across, default=1)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Pictures of one size side by side on white."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white"
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (gap + x * (width + gap), gap + y * (height + gap)))
    return sheet
