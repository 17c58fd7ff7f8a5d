"""Pictures as data sets hold them, opened, checked and made RGB."""

import base64
import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200  # what the families' image processors accept
MAX_IMAGE_PIXELS = 100_000_000  # beyond it a small file that unpacks to gigabytes is likelier than a photograph
# What a whole file has among its last bytes (WebP is checked when opened); one of another format is decoded to see.
ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "WEBP": b""}


def open_image(stored, root: Path | None, pixels: bool = True) -> Image.Image:
    """A picture as data sets hold them: decoded, bytes, {bytes, path}, a path, base64 text.

    Paths are relative to `root` and must lie beneath it, links followed, or in the hub's caches: a data set from
    elsewhere must not put a file of this machine on a page. With `pixels` false the picture is not decoded, as far as
    its file shows without that whether it is whole.

    Raises:
        ValueError: one line, where that is not a usable picture.
    """
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, Image.Image):
        return to_rgb(stored)
    if isinstance(stored, str) and stored:
        path = root / stored if root else Path(stored)
        if os.path.isfile(path):  # unlike Path.is_file, says no to text that is too long for a name
            if root and not (is_beneath(path, root) or any(is_beneath(path, cache) for cache in hub_caches())):
                raise ValueError(f"image {stored!r} lies outside of {root}; --image-root names another folder")
            source = path
        elif path.suffix.lower() in Image.registered_extensions() or "://" in stored or len(stored) < 64:
            raise ValueError(f"no image file {stored!r}")
        else:
            source = io.BytesIO(base64.b64decode(stored.partition("base64,")[2] or stored))
    elif isinstance(stored, bytes) and stored:
        source = io.BytesIO(stored)
    else:
        raise ValueError(f"no image in a value of type {type(stored).__name__}")
    where = f" {stored!r}" if isinstance(source, Path) else ""
    try:
        # What PIL warns of, odd metadata or a great size, is harmless or refused below.
        with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(f"{width} x {height} pixels: more than {MAX_ASPECT_RATIO} times as long as wide")
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels: more than {MAX_IMAGE_PIXELS:,}")
            if pixels:
                return to_rgb(image)
            if image.format not in ENDINGS or ENDINGS[image.format] not in last_bytes(source):
                image.load()
            return image
    except Exception as error:  # PIL's formats raise a dozen types on broken files, SyntaxError among them
        reason = "not in a known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ValueError(f"image{where}: {reason}") from None


def is_beneath(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def hub_caches() -> tuple[Path, ...]:
    """Where `datasets` keeps what it downloads and unpacks."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)


def last_bytes(source: Path | io.BytesIO, count: int = 64) -> bytes:
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()[-count:]) as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - count))
        return file.read()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright, transparency on white; of an animation the first frame. Raises what PIL does on broken data."""
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data, of whatever type PIL raises, makes no picture unusable
        image = ImageOps.exif_transpose(image)
    return plain_rgb(image)


def plain_rgb(image: Image.Image) -> Image.Image:
    """RGB of the same size from any mode, transparency on white. Raises what PIL does on broken data.

    White is 65535 in a 16-bit picture. For 32-bit integers and floats no file says what it is: the first of 1, 255 and
    65535 that no value exceeds, or else the highest value.
    """
    if image.mode.startswith(("I", "F")):  # 16 bits and more: PIL would cut them off at 255
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0, where=np.isfinite(values))
        usual = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        white = next((w for w in usual if highest <= w), highest)
        scaled = np.nan_to_num(255 * values / white).clip(0, 255).astype(np.uint8)
        scaled[values == image.info.get("transparency", np.nan)] = 255  # in such a picture one level is transparent
        image = Image.fromarray(scaled)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
