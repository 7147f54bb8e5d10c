"""Pictures of every mode are decoded as a viewer shows them, from files and from tables, or give a one-line error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.sampling import read_images

RED, WHITE = (200, 30, 10), (255, 255, 255)


def png(depth: int, colour: int, row: bytes, width: int, transparent: bytes | None = None) -> bytes:
    """A PNG with two equal rows, assembled here because Pillow does not write this kind."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 2, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + (b"" if transparent is None else chunk(b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(2 * (b"\0" + row))) + chunk(b"IEND", b"")


def saved(picture: PIL.Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def painted(mode: str, left: Any, right: Any) -> PIL.Image.Image:
    """2×2 pixels, with one value in the left column and another in the right one."""
    picture = PIL.Image.new(mode, (2, 2), left)
    picture.paste(right, (1, 0, 2, 2))
    return picture


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def palette(mode: str = "P", **options: Any) -> bytes:
    picture = PIL.Image.new("P", (2, 2), 0)
    picture.putpalette([*RED, 9, 9, 9, *[0] * 762])
    picture.paste(1, (1, 0, 2, 2))
    return saved(picture, **options)


def turned(form: str) -> bytes:
    """The picture [[1, 2], [1, 2]], stored rotated, with an EXIF orientation that rotates it back."""
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # rotate clockwise
    picture = painted("L", 10, 200).transpose(PIL.Image.Transpose.ROTATE_90)
    options = {"quality": 100} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    return saved(picture, form, exif=exif, **options)


def animation() -> bytes:
    return saved(painted("L", 10, 200), "GIF", save_all=True, append_images=[painted("L", 0, 0)])


CLEAR = painted("RGBA", (*RED, 255), (0, 0, 0, 0))
GREY_SIXTEEN = np.array([[0, 257 * 77], [0, 257 * 77]], np.uint16)

# The file, its suffix, and the expected two pixels of each row.
PICTURES: dict[str, tuple[bytes, str, list[Any]]] = {
    "grey": (saved(painted("L", 10, 200)), "png", [10, 200]),
    "black and white": (saved(painted("1", 0, 1)), "png", [0, 255]),
    "colours": (saved(painted("RGB", RED, WHITE)), "png", [RED, WHITE]),
    "opaque": (saved(painted("RGBA", (*RED, 255), (1, 2, 3, 255))), "png", [RED, (1, 2, 3)]),
    "hidden black": (saved(painted("RGBA", (*RED, 255), (0, 0, 0, 0))), "png", [RED, WHITE]),
    "hidden red": (saved(painted("RGBA", (*RED, 255), (240, 30, 10, 0))), "png", [RED, WHITE]),
    # Half transparent over white: 255 − (255 − c)·128/255, rounded.
    "half transparent": (saved(painted("RGBA", (*RED, 255), (0, 0, 0, 128))), "png", [RED, (127, 127, 127)]),
    "grey with alpha": (saved(painted("LA", (10, 255), (0, 0))), "png", [10, 255]),
    "transparent WebP": (saved(CLEAR, "WEBP", lossless=True), "webp", [RED, WHITE]),
    "transparent TIFF": (saved(CLEAR, "TIFF"), "tif", [RED, WHITE]),
    "a palette": (palette(), "png", [RED, (9, 9, 9)]),
    "a palette with a transparent colour": (palette(transparency=1), "png", [RED, WHITE]),
    "a palette with alpha": (palette(transparency=bytes([255, 0])), "png", [RED, WHITE]),
    "a transparent grey": (saved(painted("L", 10, 200), transparency=200), "png", [10, 255]),
    "a transparent colour": (saved(painted("RGB", RED, (1, 2, 3)), transparency=(1, 2, 3)), "png", [RED, WHITE]),
    "a transparent bit": (png(1, 0, bytes([0b01000000]), 2, words(0)), "png", [255, 255]),
    "a transparent grey of 2 bits": (png(2, 0, bytes([0b01100000]), 2, words(1)), "png", [255, 170]),
    "a transparent grey of 4 bits": (png(4, 0, bytes([0x2F]), 2, words(2)), "png", [255, 255]),
    "no transparent grey of 4 bits": (png(4, 0, bytes([0x2E]), 2, words(3)), "png", [34, 238]),
    "a transparent grey of 16 bits": (png(16, 0, words(257, 514), 2, words(257)), "png", [255, 2]),
    "a transparent colour of 16 bits": (
        png(16, 2, words(257, 514, 771, 0, 0, 257), 2, words(257, 514, 771)),
        "png",
        [WHITE, (0, 0, 1)],
    ),
    "16 bits": (saved(PIL.Image.fromarray(GREY_SIXTEEN)), "png", [0, 77]),
    "16 bits, rounded": (png(16, 0, words(128, 129), 2), "png", [0, 1]),
    "16 bits, white": (png(16, 0, words(65535, 65407), 2), "png", [255, 255]),
    "16 bits with alpha": (png(16, 4, words(257 * 9, 65535, 0, 0), 2), "png", [(9, 9, 9), WHITE]),
    "16-bit colours": (png(16, 2, words(*(257 * value for value in (*RED, *WHITE))), 2), "png", [RED, WHITE]),
    "16-bit TIFF": (saved(PIL.Image.fromarray(GREY_SIXTEEN), "TIFF"), "tif", [0, 77]),
    "16-bit big-endian TIFF": (saved(PIL.Image.fromarray(GREY_SIXTEEN.astype(">u2")), "TIFF"), "tiff", [0, 77]),
    "16-bit PGM": (b"P5\n2 2\n65535\n" + words(0, 257 * 77, 0, 257 * 77), "pgm", [0, 77]),
    "10-bit PGM": (b"P5\n2 2\n1023\n" + words(0, 1023, 0, 1023), "pgm", [0, 255]),
    "16-bit JPEG 2000": (saved(PIL.Image.fromarray(GREY_SIXTEEN), "JPEG2000"), "jp2", [0, 77]),
    "inks": (saved(painted("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), "TIFF"), "tif", [(0, 0, 0), WHITE]),
    "an animation": (animation(), "gif", [(10, 10, 10), (200, 200, 200)]),
    "turned PNG": (turned("PNG"), "png", [10, 200]),
    "turned TIFF": (turned("TIFF"), "tif", [10, 200]),
    "turned WebP": (turned("WEBP"), "webp", [(10, 10, 10), (200, 200, 200)]),
}


def from_files(root: Path, content: bytes, suffix: str, **options: Any) -> torch.Tensor:
    (root / "test").mkdir()
    for index in range(2):
        (root / "test" / f"{index}.{suffix}").write_bytes(content)
    return load_images(str(root), "test", **options).pixels


def from_parquet(root: Path, content: bytes, **options: Any) -> torch.Tensor:
    features = datasets.Features(image=datasets.Image())
    table = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}] * 2}, features=features)
    root.mkdir()
    table.to_parquet(root / "test.parquet")
    return load_images(str(root), "test", **options).pixels


def pixels_of(row: list[Any]) -> torch.Tensor:
    """Two equal pictures of two equal rows, [2, C, 2, 2]."""
    values = torch.tensor(row, dtype=torch.uint8).reshape(2, -1).T
    return values[None, :, None, :].expand(2, -1, 2, -1)


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_are_what_one_sees(case: str, tmp_path: Path) -> None:
    content, suffix, row = PICTURES[case]
    expected = pixels_of(row)
    actual = from_files(tmp_path, content, suffix)
    assert torch.equal(actual, expected), actual[0].tolist()
    assert torch.equal(from_parquet(tmp_path / "table", content), expected)
    assert torch.equal(read_images(tmp_path, expected.shape[1]), expected)


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    actual = from_files(tmp_path, turned("JPEG"), "jpg").int()
    assert (actual - pixels_of([10, 200]).int()).abs().max() <= 2  # the loss of JPEG at the best quality


@pytest.mark.parametrize("case", ["hidden black", "a palette with alpha", "a transparent colour"])
def test_grey_is_made_of_what_one_sees(case: str, tmp_path: Path) -> None:
    content, suffix, _ = PICTURES[case]
    # ITU-R 601: .299 · 200 + .587 · 30 + .114 · 10 = 78.55
    assert torch.equal(from_files(tmp_path, content, suffix, channels=1), pixels_of([79, 255]))


DAMAGED = {
    "cut PNG": (saved(PIL.Image.effect_noise((64, 64), 90))[:900], "png"),
    "cut JPEG": (saved(PIL.Image.effect_noise((64, 64), 90), "JPEG")[:900], "jpg"),
    "nothing": (b"", "png"),
    "words": (b"no picture at all", "png"),
    "a bomb": (png(8, 0, b"\0", 2).replace(struct.pack(">II", 2, 2), struct.pack(">II", 50000, 50000)), "png"),
    "another suffix": (b"%PDF-1.4", "gif"),
}
UNKNOWN = {
    "floating point": (saved(PIL.Image.new("F", (2, 2), 0.5), "TIFF"), "tif"),
    "32 bits": (saved(PIL.Image.new("I", (2, 2), 70000), "TIFF"), "tif"),
}


@pytest.mark.parametrize("case", [*DAMAGED, *UNKNOWN])
def test_what_cannot_be_seen_is_named(case: str, tmp_path: Path) -> None:
    content, suffix = (DAMAGED | UNKNOWN)[case]
    expected = "must hold 8-bit or 16-bit images, saved as PNG" if case in UNKNOWN else "must hold readable images"
    for argument, read in {
        "dataset": lambda: from_files(tmp_path, content, suffix),
        "images": lambda: read_images(tmp_path, 1),
    }.items():
        with pytest.raises(InputError) as refusal:
            read()
        message = str(refusal.value)
        assert message.startswith(f"`{argument}` {expected}") and f"0.{suffix}" in message and "\n" not in message
    with pytest.raises(InputError, match=expected):
        from_parquet(tmp_path / "table", content)
