"""Data sets: exact pixels, deterministic splits and order, equal images from memory and from disk."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ot_diffusers.data import (
    ResidentImages,
    StreamedImages,
    load_images,
    to_model_range,
    to_uint8,
    to_unit_range,
    training_order,
)
from ot_diffusers.errors import InputError


def make_image(seed: int, height: int = 8, width: int = 8, mode: str = "L") -> PIL.Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def make_table(images: list[PIL.Image.Image], column: str = "image") -> datasets.Dataset:
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({column: images, "label": [i % 3 for i in range(len(images))]}, features=features)


def write_parquet(folder: Path, **splits: datasets.Dataset) -> str:
    """Write splits to a folder in the Hub's layout."""
    folder.mkdir(parents=True)
    for name, table in splits.items():
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def pixels_of(images: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).reshape(-1, *image.size[::-1]) for image in images])


def images_as_bytes(images: ResidentImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


# Ranges


def test_every_uint8_value_survives_the_model_range():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_model_range(values).aminmax() == (torch.tensor(-1.0), torch.tensor(1.0))
    assert torch.equal(to_uint8(to_model_range(values)), values)


def test_ranges_clamp_what_lies_outside():
    assert torch.equal(to_unit_range(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])), torch.tensor([0, 0, 0.5, 1, 1]))
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_to_uint8_agrees_with_the_pictures_of_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    pictures = VaeImageProcessor().postprocess(images, output_type="pil")
    ours = to_uint8(images).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(np.array(picture), image) for picture, image in zip(pictures, ours, strict=True))


# Digits


def test_digits_are_a_partition_of_the_embedded_images():
    parts = {split: load_images("digits", split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1152, "validation": 105, "test": 540}
    raw = load_digits()
    expected = sorted(np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in raw.images)
    actual = sorted(image.numpy().tobytes() for part in parts.values() for image in part.pixels)
    assert actual == expected  # as multisets: no image is lost or used twice


@pytest.mark.parametrize(("split", "others"), [("test", ["train", "validation"]), ("validation", ["train"])])
def test_digits_splits_are_stratified(split, others):
    part = torch.bincount(load_images("digits", split).labels, minlength=10)
    whole = part + sum(torch.bincount(load_images("digits", name).labels, minlength=10) for name in others)
    share = whole * part.sum() / whole.sum()
    # Within each class, images are chosen in the order of their quantile (r + 1/2) / n_c, so that the share of a class
    # is rounded up or down.
    assert (part - share).abs().max() <= 1


def test_digits_labels_belong_to_their_images():
    raw = load_digits()
    label_of = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(raw.images, raw.target, strict=True)
    }
    test = load_images("digits", "test")
    assert [label_of[image.numpy().tobytes()] for image in test.pixels] == test.labels.tolist()


def test_digits_test_split_is_pinned():
    # A change of these pixels would silently invalidate every published result on digits.
    fingerprint = "6bdf99a527a59fed588d48ab820c9a347589181ab0f2abbdd5810814661044a9"
    assert load_images("digits", "test").fingerprint == fingerprint


# Folders and splits


def test_images_come_back_bit_for_bit(tmp_path):
    images = [make_image(i, 6, 7, "RGB") for i in range(24)]
    folder = write_parquet(tmp_path / "hub", train=make_table(images[:12]), test=make_table(images[12:]))
    test = load_images(folder, "test")
    assert test.image_shape == (3, 6, 7)
    expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images[12:]])
    assert torch.equal(test.pixels, expected)
    assert torch.equal(to_uint8(test.fetch(torch.arange(12))), expected)
    assert test.labels.tolist() == [i % 3 for i in range(12)]


def test_validation_is_cut_from_train_and_test_is_untouched(tmp_path):
    images = [make_image(i) for i in range(34)]
    folder = write_parquet(tmp_path / "hub", train=make_table(images[:24]), test=make_table(images[24:]))
    train, validation, test = (load_images(folder, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (22, 2, 10)  # round(24 / 12) = 2
    assert images_as_bytes(train) | images_as_bytes(validation) == {image.tobytes() for image in images[:24]}
    assert torch.equal(test.pixels, pixels_of(images[24:]))
    assert validation.split == "validation (2 of 24 train images)"
    assert test.split == "test"


def test_missing_test_split_is_cut_and_named(tmp_path):
    images = [make_image(i) for i in range(72)]
    folder = write_parquet(tmp_path / "hub", train=make_table(images))
    parts = [load_images(folder, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [55, 5, 12]  # 72 / 6 = 12, then 60 / 12 = 5
    assert set.union(*map(images_as_bytes, parts)) == {image.tobytes() for image in images}
    assert parts[2].split == "test (12 of 72 train images)"


def test_own_validation_split_is_used(tmp_path):
    images = [make_image(i) for i in range(30)]
    splits = {"train": images[:12], "validation": images[12:17], "test": images[17:]}
    folder = write_parquet(tmp_path / "hub", **{name: make_table(part) for name, part in splits.items()})
    for name, part in splits.items():
        assert torch.equal(load_images(folder, name).pixels, pixels_of(part))


def test_fingerprint_is_the_same_wherever_the_images_lie(tmp_path):
    images = [make_image(i) for i in range(12)]
    tables = datasets.DatasetDict(train=make_table(images), test=make_table(images))
    tables.save_to_disk(tmp_path / "disk")
    for i, image in enumerate(images):
        (tmp_path / "pictures" / "test" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / "train" / "a").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "pictures" / "test" / "a" / f"{i:02}.png")
        image.save(tmp_path / "pictures" / "train" / "a" / f"{i:02}.png")
    folders = [write_parquet(tmp_path / "hub", **tables), str(tmp_path / "disk"), str(tmp_path / "pictures")]
    fingerprints = {load_images(folder, "test").fingerprint for folder in folders}
    fingerprints |= {load_images(folder, "test", max_resident_bytes=0).fingerprint for folder in folders}
    assert len(fingerprints) == 1
    other = [*images[:-1], make_image(99)]
    folder = write_parquet(tmp_path / "other", train=make_table(images), test=make_table(other))
    assert load_images(folder, "test").fingerprint not in fingerprints


def test_image_folder_has_the_classes_as_labels(tmp_path):
    for i, name in itertools.product(range(4), ("cat", "dog")):
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        make_image(i, mode="RGB").save(tmp_path / "test" / name / f"{i}.png")
        make_image(i, mode="RGB").save(tmp_path / "train" / name / f"{i}.png")
    test = load_images(str(tmp_path), "test")
    assert test.labels.tolist() == [0] * 4 + [1] * 4
    assert test.image_shape == (3, 8, 8)


# Columns, size, channels


def test_configurations_and_folders_of_a_data_set_are_chosen(tmp_path):
    parts = {"odd": range(1, 40, 2), "even": range(0, 40, 2)}
    for name, seeds in parts.items():
        write_parquet(tmp_path / name, train=make_table([make_image(seed) for seed in seeds]))
    refused("`dataset_config_name` must be none for a folder whose README", str(tmp_path), dataset_config_name="odd")
    within = {name: load_images(str(tmp_path), data_dir=name).fingerprint for name in parts}
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in parts)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    named = {name: load_images(str(tmp_path), dataset_config_name=name).fingerprint for name in parts}
    assert named == within and named["odd"] != named["even"]

    refused(r"`dataset_config_name` must be one of '.*', '.*', got None", str(tmp_path))
    refused(r"`dataset_config_name` must be one of '.*', '.*', got 'all'", str(tmp_path), dataset_config_name="all")
    refused("`dataset_revision` must be none for a local data set, got 'v2'", str(tmp_path), dataset_revision="v2")
    refused("`data_dir` must be a folder in .*, got 'absent'", str(tmp_path), data_dir="absent")
    refused("`data_dir` must be none for the embedded digits, got 'odd'", "digits", data_dir="odd")


def test_the_hub_is_asked_for_the_chosen_part(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.DatasetDict(train=make_table([make_image(seed) for seed in range(20)]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    part = {"dataset_config_name": "small", "dataset_revision": "v2", "data_dir": "photos"}
    assert load_images("user/photos", **part).hub_id == "user/photos"
    assert asked == [(("user/photos", "small"), {"data_dir": "photos", "revision": "v2"})]


def test_image_column_is_found_or_named(tmp_path):
    images = [make_image(i) for i in range(12)]
    folder = write_parquet(tmp_path / "hub", train=make_table(images, "img"), test=make_table(images, "img"))
    assert torch.equal(load_images(folder, "test").pixels, pixels_of(images))
    assert torch.equal(load_images(folder, "test", image_column="img").pixels, pixels_of(images))


def test_resizing_keeps_constants_and_crops_the_centre(tmp_path):
    # 4×8: a constant 4×4 centre between dark columns; the crop contains only the centre.
    array = np.zeros((4, 8), np.uint8)
    array[:, 2:6] = 200
    table = make_table([PIL.Image.fromarray(array)] * 12)
    folder = write_parquet(tmp_path / "hub", train=table, test=table)
    cropped = load_images(folder, "test", image_size=4)
    assert torch.equal(cropped.pixels, torch.full((12, 1, 4, 4), 200, dtype=torch.uint8))


def test_downscaling_is_antialiased(tmp_path):
    # A checkerboard of 0 and 254 becomes 127 under any smoothing kernel; subsampling would give 0 or 254.
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 254).astype(np.uint8)
    table = make_table([PIL.Image.fromarray(board)] * 12)
    small = load_images(write_parquet(tmp_path / "hub", train=table, test=table), "test", image_size=8)
    centre = small.pixels[:, :, 1:-1, 1:-1].float()
    assert (centre - 127).abs().max() <= 2  # Pillow rounds the 8-bit kernel weights and the result of each pass


def test_grey_and_rgb_convert():
    grey, rgb = load_images("digits", "test"), load_images("digits", "test", channels=3)
    assert torch.equal(rgb.pixels, grey.pixels.expand(-1, 3, -1, -1))


# In memory and on demand


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_images_are_the_resident_ones(num_workers):
    resident, streamed = load_images("digits", "test"), load_images("digits", "test", max_resident_bytes=0)
    assert isinstance(resident, ResidentImages) and isinstance(streamed, StreamedImages)
    assert torch.equal(streamed.labels, resident.labels) and streamed.image_shape == resident.image_shape
    batches = list(itertools.islice(training_order(540, 50, seed=3), 12))
    both = zip(resident.stream(batches), streamed.stream(batches, num_workers), batches, strict=True)
    for (indices, images), (streamed_indices, streamed_images), expected in both:
        assert torch.equal(indices, expected) and torch.equal(streamed_indices, expected)
        assert torch.equal(images, streamed_images)
    assert torch.equal(streamed.fetch(batches[0]), resident.fetch(batches[0]))


def test_an_endless_order_streams():
    streamed = load_images("digits", "validation", max_resident_bytes=0)
    stream = streamed.stream(training_order(105, 50, seed=0))
    assert len(list(itertools.islice(stream, 7))) == 7


# The order of training


@given(num_samples=st.integers(1, 40), seed=st.integers(0, 2**40), epochs=st.integers(1, 3), divisor=st.integers(1, 40))
def test_each_epoch_visits_whole_batches_of_distinct_images(num_samples, seed, epochs, divisor):
    batch_size = max(1, num_samples // divisor)
    per_epoch = num_samples // batch_size
    order = training_order(num_samples, batch_size, seed=seed)
    for _ in range(epochs):
        epoch = torch.cat([next(order) for _ in range(per_epoch)])
        assert epoch.dtype == torch.int64 and len(epoch) == per_epoch * batch_size
        assert epoch.unique().numel() == len(epoch) and epoch.min() >= 0 and epoch.max() < num_samples


@given(start=st.integers(0, 30))
def test_order_resumes_at_any_step(start):
    whole = list(itertools.islice(training_order(23, 4, seed=7), start + 6))
    resumed = list(itertools.islice(training_order(23, 4, seed=7, start=start), 6))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_order_starts_far_out_at_once():
    next(training_order(60_000, 128, seed=0, start=10**12))


def test_epochs_and_seeds_differ():
    first, second = itertools.islice(training_order(100, 100, seed=0), 2)
    other = next(training_order(100, 100, seed=1))
    assert not torch.equal(first, second) and not torch.equal(first, other) and not torch.equal(second, other)


# Bad input: one line with the argument, the requirement and the value


def refused(match: str, *args: object, **kwargs: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_images(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_data_sets_are_refused(tmp_path):
    refused(r"`dataset` must be digits, mnist, cifar10, an existing folder .* got './missing'", "./missing")
    refused(r"got 'no/such-set' \(no such folder here, and loading 'no/such-set' from the Hub failed", "no/such-set")
    refused(r"`dataset` must be a folder with parquet, arrow or image files", str(tmp_path))
    refused(r"`dataset` must be digits.*got ''", "")


def test_unknown_options_are_refused():
    refused(r"`split` must be one of train, validation, test, got 'val'", "digits", "val")
    refused(r"`channels` must be 1 .* got 2", "digits", channels=2)
    refused(r"`image_size` must be positive, got 0", "digits", image_size=0)
    refused(r"`image_column` must be one of the columns image, label, got 'img'", "digits", image_column="img")
    refused(r"`label_column` must be one of the columns image, label, got 'y'", "digits", label_column="y")
    refused(r"`label_column` must hold integers, strings or booleans, got 'image'", "digits", label_column="image")
    refused(r"`image_column` must hold images, got 'label'", "digits", image_column="label")


def test_a_table_without_images_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a"] * 12, "label": [0] * 12})
    refused(r"`image_column` must be given.* text, label", write_parquet(tmp_path / "hub", train=table))


def test_an_empty_split_is_refused(tmp_path):
    folder = write_parquet(tmp_path / "hub", train=make_table([make_image(0)] * 3), test=make_table([make_image(0)]))
    refused(r"`dataset` must have images in its validation split", folder, "validation")  # round(3 / 12) = 0


def test_a_set_with_only_a_test_split_cannot_be_trained_on(tmp_path):
    folder = write_parquet(tmp_path / "hub", test=make_table([make_image(0)] * 12))
    assert len(load_images(folder, "test")) == 12
    refused(r"`dataset` must have a train split beside test", folder, "train")


@pytest.mark.parametrize("max_resident_bytes", [2**20, 0])
def test_images_of_different_shape_are_refused(tmp_path, max_resident_bytes):
    images = [make_image(i) for i in range(11)]
    for odd, argument in [(make_image(0, 8, 9), "image_size"), (make_image(0, mode="RGB"), "channels")]:
        table = make_table([*images, odd])
        folder = write_parquet(tmp_path / argument, train=table, test=table)
        with pytest.raises(InputError, match=f"`{argument}` must be given .* image 11 "):
            load_images(folder, "test", max_resident_bytes=max_resident_bytes).fetch(torch.arange(12))
        options = {"image_size": 8} if argument == "image_size" else {"channels": 1}
        assert load_images(folder, "test", **options).image_shape == (1, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_any_start_method(tmp_path, method):
    """A worker decodes the same images as this process, and its errors are one line."""
    for i in range(12):
        make_image(i).save(tmp_path / f"{i:02}.png")
    streamed, resident = (load_images(str(tmp_path), max_resident_bytes=size) for size in (0, 2**20))
    damaged = Path(streamed.decoder.table[8]["image"]["path"])
    damaged.write_bytes(b"")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = streamed.stream([torch.arange(3), torch.arange(3, 9)], num_workers=1)
        assert torch.equal(next(batches)[1], resident.fetch(torch.arange(3)))
        with pytest.raises(InputError, match=damaged.name) as caught:
            next(batches)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, num_workers):
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    for i in range(12):
        make_image(i).save(tmp_path / "train" / f"{i:02}.png")
        make_image(i).save(tmp_path / "test" / f"{i:02}.png")
    damaged = tmp_path / "test" / "05.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    refused(r"`dataset` must hold readable images, got image 5 .*05\.png", str(tmp_path), "test")
    streamed = load_images(str(tmp_path), "test", max_resident_bytes=0)
    with pytest.raises(InputError, match="image 5 ") as caught:
        list(streamed.stream([torch.arange(12)], num_workers))
    assert len(str(caught.value).splitlines()) == 1


def test_bad_orders_are_refused_before_the_first_batch():
    for options, argument in [
        ({"num_samples": 3, "batch_size": 4, "seed": 0}, "batch_size"),
        ({"num_samples": 3, "batch_size": 0, "seed": 0}, "batch_size"),
        ({"num_samples": 3, "batch_size": 1, "seed": -1}, "seed"),
        ({"num_samples": 3, "batch_size": 1, "seed": 0, "start": -1}, "start"),
    ]:
        with pytest.raises(InputError, match=f"`{argument}` must"):
            training_order(**options)


def test_environment_names_the_folder_of_mnist(tmp_path, monkeypatch):
    images = [make_image(seed) for seed in range(30)]
    write_parquet(tmp_path / "mnist", train=make_table(images))
    monkeypatch.setenv("OT_DIFFUSERS_DATASETS", str(tmp_path))
    actual = load_images("mnist", "test")
    assert actual.name == "mnist" and len(actual) == 5
    with pytest.raises(InputError, match="'cifar10'"):  # not in that folder, and tests are offline
        load_images("cifar10", "test")


# Real data


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist", (1, 28, 28), (55000, 5000, 10000)), ("cifar10", (3, 32, 32), (45833, 4167, 10000))],
)
def test_real_data_opens(real_datasets, name, shape, sizes):
    folder = str(real_datasets / name)
    parts = [load_images(folder, split, max_resident_bytes=0) for split in ("train", "validation", "test")]
    assert tuple(map(len, parts)) == sizes
    for part in parts:
        assert part.image_shape == shape
        assert part.labels.unique().tolist() == list(range(10))
        assert part.fetch(torch.arange(4)).abs().max() <= 1
