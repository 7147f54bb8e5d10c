"""Decodes pictures to uint8 pixels as a viewer shows them, or raises an error that names the file and the remedy."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    import datasets

DECODE_CHUNK = 1000
WORD_MODES = ("I;16", "I;16B", "I;16L", "I;16N")  # 0 … 65535
GREY_MODES = ("1", "L", "LA", "I", "F", *WORD_MODES)

LOW_LEVELS = {"L;2": 85, "L;4": 17}
"""Grey steps of PNG with 2 and 4 bits. Pillow scales pixels by them, but not the level that marks transparency."""


class Decoder(torch.utils.data.Dataset):
    """uint8 pixels of a table of encoded pictures, which must all have the shape of the first.

    Args:
        table: a table whose `column` contains `{"bytes": …, "path": …}`.
        column: name of the column of pictures.
        where: name of the table in messages.
        image_size: scale the shorter side to this length and crop the centre; None keeps the size.
        channels: 1 (grey) or 3 (RGB); None keeps the number of channels.
        argument: name of the argument with which the user chose the pictures.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        column: str,
        where: str,
        image_size: int | None,
        channels: int | None,
        argument: str = "dataset",
    ) -> None:
        self.table, self.column, self.where = table, column, where
        self.image_size, self.channels, self.argument = image_size, channels, argument
        first = self._decode_one(table[0][column], 0)
        self.image_shape: tuple[int, int, int] = (first.shape[0], first.shape[1], first.shape[2])

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor | InputError]:
        """One batch for a DataLoader. Workers return errors as values, so that the message stays one line."""
        try:
            return torch.tensor(indices), self.decode(indices)
        except InputError as error:
            return torch.tensor(indices), error

    def decode_all(self) -> Tensor:
        """All pictures, uint8 [N, C, H, W]."""
        pixels = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for chunk in chunks(len(self)):
            pixels[chunk.start : chunk.stop] = self.decode(chunk)
        return pixels

    def decode(self, indices: Sequence[int]) -> Tensor:
        """The pictures in rows `indices`, uint8 [B, C, H, W]."""
        pixels = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        for row, (index, value) in enumerate(zip(indices, self.table[indices][self.column], strict=True)):
            image = self._decode_one(value, index)
            if image.shape != self.image_shape:
                raise self._other_shape(image.shape, self._place(value, index))
            pixels[row] = torch.from_numpy(image)
        return pixels

    def _decode_one(self, value: dict[str, Any] | None, index: int) -> np.ndarray:
        """One picture, uint8 [C, H, W]."""
        if value is None or (value.get("bytes") is None and value.get("path") is None):
            place = f"row {index} of {self.where}"
            raise InputError(f"`{self.argument}` must have an image in every row, got none in {place}")
        try:
            return to_pixels(visible_picture(open_picture(value)), self.image_size, self.channels)
        except Exception as error:  # Pillow's readers raise many types of exceptions on damaged files
            unknown = isinstance(error, UnknownRangeError)
            requirement = "hold 8-bit or 16-bit images, saved as PNG for example" if unknown else "hold readable images"
            culprit = f"{self._place(value, index)} ({error if unknown else first_line(error)})"
            raise InputError(f"`{self.argument}` must {requirement}, got {culprit}") from error

    def _place(self, value: dict[str, Any], index: int) -> str:
        """The row and, if known, the file of a picture."""
        file = f", file {value['path']}" if value.get("path") else ""
        return f"image {index} of {self.where}{file}"

    def _other_shape(self, shape: tuple[int, ...], place: str) -> InputError:
        first, this = ("×".join(map(str, size)) for size in (self.image_shape, shape))
        if self.argument != "dataset":
            return InputError(
                f"`{self.argument}` must hold images of one shape, here {first}, got {place} with shape {this}"
            )
        argument = "channels" if shape[1:] == self.image_shape[1:] else "image_size"
        shapes = f"image 0 is {first}, {place} is {this}"
        return InputError(f"`{argument}` must be given for images of different shape ({shapes}), got None")


class UnknownRangeError(ValueError):
    """A picture whose numbers have no defined black and white."""


def open_picture(value: dict[str, Any]) -> PIL.Image.Image:
    """The decoded picture of `{"bytes": …, "path": …}`, rotated by its EXIF orientation."""
    if value["bytes"] is None and "://" in value["path"]:
        import datasets

        return datasets.Image().decode_example(value)
    with PIL.Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as picture:
        key = picture.info.get("transparency")
        if picture.format == "PNG" and isinstance(key, int) and picture.tile[0].args in LOW_LEVELS:
            picture.info["transparency"] = key * LOW_LEVELS[picture.tile[0].args]
        picture.load()
        orientation = picture.getexif().get(PIL.Image.ExifTags.Base.Orientation)
    if picture.mode == "I" and picture.format == "PPM":
        return picture.convert("I;16")  # Pillow scales the grey levels of PGM to 0 … 65535
    return picture if orientation is None else PIL.ImageOps.exif_transpose(picture)


def visible_picture(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as a viewer shows it, in mode L or RGB: 16 bits scaled to 8, transparent parts on white.

    Raises:
        UnknownRangeError: a 32-bit or floating-point picture.
    """
    grey = picture.mode in GREY_MODES
    if picture.mode in WORD_MODES:
        picture = _bytes_of_words(picture)
    if picture.mode in ("I", "F"):
        raise UnknownRangeError(f"mode {picture.mode!r} does not define black and white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if grey else "RGB")


def _bytes_of_words(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A 16-bit picture in mode L, or in mode LA if one of its grey levels is transparent."""
    words = np.asarray(picture).astype(np.int64)
    scaled = PIL.Image.fromarray(np.round(words / 257).astype(np.uint8))
    key = picture.info.get("transparency")
    if key is None:
        return scaled
    return PIL.Image.merge("LA", (scaled, PIL.Image.fromarray(np.where(words == key, 0, 255).astype(np.uint8))))


def to_pixels(picture: PIL.Image.Image, image_size: int | None, channels: int | None) -> np.ndarray:
    """uint8 [C, H, W] of a picture in mode L or RGB, scaled and cropped to `image_size`² if this is given."""
    channels = channels or (1 if picture.mode == "L" else 3)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if image_size is not None and picture.size != (image_size, image_size):
        picture = PIL.ImageOps.fit(picture, (image_size, image_size), method=PIL.Image.Resampling.BILINEAR)
    pixels = np.array(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def chunks(num_samples: int) -> Iterator[range]:
    """Row numbers in chunks of at most `DECODE_CHUNK`."""
    for start in range(0, num_samples, DECODE_CHUNK):
        yield range(start, min(start + DECODE_CHUNK, num_samples))


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
