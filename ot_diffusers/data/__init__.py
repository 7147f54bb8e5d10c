"""One table of data sets, and their images in [-1, 1] for a training loop.

| `dataset`                 | what it is                                                                    |
|---------------------------|-------------------------------------------------------------------------------|
| `digits`                  | scikit-learn's 1,797 handwritten digits, grey 8×8, embedded: nothing to fetch |
| `mnist`                   | `ylecun/mnist`, grey 28×28                                                    |
| `cifar10`                 | `uoft-cs/cifar10`, RGB 32×32                                                  |
| a folder of pictures      | any format that Pillow reads, see `ot_diffusers.data.pictures`                |
| a folder of tables        | parquet or arrow files in a Hub layout, or `save_to_disk` output              |
| anything else             | a data set's id on the Hub                                                    |

Where the environment variable `OT_DIFFUSERS_DATASETS` names a folder with `mnist/` or `cifar10/` in their Hub layouts,
these are read from there.

Every data set has the splits `train`, `validation` and `test`. What it lacks is cut out of its train split,
always in the same way: 1/6 for `test`, then 1/12 of the remaining images for `validation`. A test split that exists is
used as it is.

Pictures become what one sees of them: upright as their EXIF orientation says, transparent parts on white, 16 bits
scaled to 8, the first frame of an animation. Where black and white are not known, as in floating-point TIFF, they are
refused.

Labels are the integers, texts or booleans of a column, or the class folders of pictures. They are numbered 0, 1, 2, …
in sorted order over all splits; a column of the type `datasets.ClassLabel` keeps its own numbers.
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
