"""Data sets by name, with their images in [-1, 1] for training.

| `dataset`                 | data set                                                                      |
|---------------------------|-------------------------------------------------------------------------------|
| `digits`                  | scikit-learn's 1,797 handwritten digits, grey 8×8, embedded: no download      |
| `mnist`                   | `ylecun/mnist`, grey 28×28                                                    |
| `cifar10`                 | `uoft-cs/cifar10`, RGB 32×32                                                  |
| a folder of pictures      | every format that Pillow reads, see `ot_diffusers.data.pictures`              |
| a folder of tables        | parquet or arrow files in a Hub layout, or `save_to_disk` output              |
| any other name            | a data set's id on the Hub                                                    |

If the environment variable `OT_DIFFUSERS_DATASETS` names a folder with `mnist/` or `cifar10/` in their Hub layouts,
these data sets are read from there.

Every data set has the splits `train`, `validation` and `test`. Missing splits are taken from the train split, always in
the same way: 1/6 for `test`, then 1/12 of the remaining images for `validation`. An existing test split is not changed.

Pictures are decoded as a viewer shows them: rotated by their EXIF orientation, transparent parts on white, 16 bits
scaled to 8 bits, the first frame of an animation. Pictures without a defined black and white, such as floating-point
TIFF, are rejected.

Labels are the integers, strings or booleans of a column, or the names of class folders. They are numbered 0, 1, 2, … in
sorted order over all splits; a column of type `datasets.ClassLabel` keeps its own numbers.
"""

from ..images import to_model_range, to_uint8, to_unit_range
from .images import ResidentImages, StreamedImages, evenly_spaced, pixels_of, training_order
from .load import DATA_OPTIONS, DATASETS_VARIABLE, HUB_IDS, ImageSource, load_images, local_folder, open_images
from .splits import SPLITS

__all__ = [
    "DATASETS_VARIABLE",
    "DATA_OPTIONS",
    "HUB_IDS",
    "SPLITS",
    "ImageSource",
    "ResidentImages",
    "StreamedImages",
    "evenly_spaced",
    "load_images",
    "local_folder",
    "open_images",
    "pixels_of",
    "to_model_range",
    "to_uint8",
    "to_unit_range",
    "training_order",
]
