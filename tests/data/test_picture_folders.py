"""Picture folders: which files are images, which folders are splits or classes, and the warnings about the rest."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch

from ot_diffusers.cli import main
from ot_diffusers.data import load_images
from ot_diffusers.errors import InputError
from ot_diffusers.sampling import read_images, save_images


def write(root: Path, files: Sequence[str]) -> Path:
    """Write files by suffix: grey 4×4 pictures with their number as grey level, or a word. `x/` is an empty folder."""
    for index, name in enumerate(files):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            file.mkdir()
        elif file.suffix.lower() in PIL.Image.registered_extensions():
            PIL.Image.new("L", (4, 4), index % 256).save(file)
        else:
            file.write_text("words")
    return root


def numbered(*folders: str, count: int = 6, suffix: str = ".png") -> list[str]:
    return [f"{folder}{'/' if folder else ''}{index}{suffix}" for folder in folders for index in range(count)]


def opened(folder: Path) -> tuple[dict[str, int], tuple[str, ...] | None, list[str]]:
    """The images of each split, original or taken from train, the class names, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # each warning once, as a user sees it
        splits = {split: load_images(str(folder), split, channels=1) for split in ("train", "validation", "test")}
    texts = [str(warning.message).removeprefix(f"{folder}: ") for warning in caught]
    return {split: len(images) for split, images in splits.items()}, splits["train"].class_names, texts


CUT = {12: (9, 1, 2), 18: (14, 1, 3), 24: (18, 2, 4), 33: (25, 2, 6), 32: (25, 2, 5)}  # 1/6, then 1/12 of the rest
WORDS = "read as classes, not as splits"

# Files; images in train, validation and test; class names; pattern of the one warning (None: no warning).
FOLDERS: dict[str, tuple[list[str], tuple[int, int, int], tuple[str, ...] | None, str | None]] = {
    "pictures": (numbered("", count=12), CUT[12], None, None),
    "classes": (numbered("car", "plane"), CUT[12], ("car", "plane"), None),
    "a class called train": (numbered("car", "plane", "train"), CUT[18], ("car", "plane", "train"), WORDS),
    "a class called test": (numbered("exam", "test"), CUT[12], ("exam", "test"), WORDS),
    "train in a file's name": (
        [*numbered("", count=30), "steam_train_1.png", "steam_train_2.png"],
        CUT[32],
        None,
        None,
    ),
    "test in a file's name": (
        [*numbered("", count=30), "crash test.png", "val_d_isere.png", "dev_kit.png"],
        CUT[33],
        None,
        None,
    ),
    "split words in folder names": (numbered("test car", "my_train"), CUT[12], ("my_train", "test car"), None),
    "splits": (numbered("train", count=12) + numbered("test"), (11, 1, 6), None, None),
    "three splits with classes": (
        numbered(*(f"{s}/{c}" for s in ("train", "validation", "test") for c in "ab")),
        (12, 12, 12),
        ("a", "b"),
        None,
    ),
    "other names of splits": (numbered("Training", count=12) + numbered("val", "Testing"), (12, 6, 6), None, None),
    "splits beside sidecars": (
        [*numbered("train", count=12), *numbered("test"), "README.md", "LICENSE", ".DS_Store", "notes/a.txt"],
        (11, 1, 6),
        None,
        r"1 × \.txt \(notes/a\.txt\)",
    ),
    "a picture beside splits": (
        [*numbered("train", "test"), *numbered("", count=12)],
        CUT[24],
        ("test", "train"),
        WORDS,
    ),
    "a class beside splits": (numbered("train", "test", "more"), CUT[18], ("more", "test", "train"), WORDS),
    "splits below a folder": (numbered("all/train", "all/test"), CUT[12], ("test", "train"), WORDS),
    "classes in one split only": (
        numbered("train/a", "train/b") + numbered("test"),
        (11, 1, 6),
        ("a", "b"),
        "6 pictures outside the class folders have no label",
    ),
    "a class of one split": (numbered("train/a", "train/b", "test/a", "test/c"), (11, 1, 12), ("a", "b", "c"), None),
    "folders in classes": (numbered("cat", "dog/old"), CUT[12], ("cat", "dog"), None),
    "classes below a folder": (numbered("images/cat", "images/dog"), CUT[12], ("cat", "dog"), None),
    "one class": (numbered("cat", count=12), CUT[12], None, None),
    "classes that are numbers": (numbered("0", "1", "10", "2"), CUT[24], ("0", "1", "10", "2"), None),
    "classes that differ in case": (numbered("cat", "Cat"), CUT[12], ("Cat", "cat"), None),
    "classes of any letters": (numbered("Ärger und Öl", "猫"), CUT[12], ("Ärger und Öl", "猫"), None),
    "brackets and stars": (numbered("a[1]", "b {2} *"), CUT[12], ("a[1]", "b {2} *"), None),
    "an empty class": ([*numbered("cat", "dog"), "emu/"], CUT[12], ("cat", "dog"), r"1 × empty folder \(emu\)"),
    "an empty split": ([*numbered("train", count=12), "test/"], CUT[12], None, r"1 × empty folder \(test\)"),
    "a picture outside the classes": (
        [*numbered("a", "b", count=5), "1.png", "2.png"],
        CUT[12],
        ("a", "b"),
        r"2 pictures outside the class folders have no label \(1\.png\)",
    ),
    "captions": (
        numbered("", count=12) + numbered("", count=12, suffix=".txt"),
        CUT[12],
        None,
        r"left out: 12 × \.txt \(0\.txt\)",
    ),
    "annotations": (
        numbered("", count=12) + numbered("", count=13, suffix=".json"),
        CUT[12],
        None,
        r"13 × \.json \(0\.json\)",
    ),
    "many sidecars": (
        [*numbered("", count=12), "a.txt", "b.zip", "c.csv", "d.HEIC", "list"],
        CUT[12],
        None,
        r"left out: 1 × \.csv .*1 × \.heic \(d\.HEIC\).*1 × \.txt.*1 × \.zip.*1 × file without a suffix \(list\)",
    ),
    "hidden files": ([*numbered("", count=12), ".cache/1.png", "__MACOSX/._1.png", "Thumbs.db"], CUT[12], None, None),
    "suffixes of all kinds": (
        [
            f"{i}{s}"
            for i, s in enumerate(
                (".PNG", ".JPEG", ".Jpg", ".tif", ".TIFF", ".bmp", ".gif", ".webp", ".pgm", ".jp2", ".png", ".tga")
            )
        ],
        CUT[12],
        None,
        None,
    ),
    "what sample wrote": ([*(f"{i:05d}.png" for i in range(12)), "grid.png"], CUT[12], None, None),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_what_they_look_like(case: str, tmp_path: Path) -> None:
    files, sizes, names, expected = FOLDERS[case]
    counts, class_names, texts = opened(write(tmp_path / "data", files))
    assert tuple(counts.values()) == sizes
    assert class_names == names
    assert len(texts) == (expected is not None)
    if expected is not None:
        assert re.search(expected, texts[0]), texts[0]


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        load_images(str(folder), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, numbered("train", "val", "valid"))
    assert "`dataset` must have one folder for each split, got \"train, val, valid in '" in refusal(folder)


def test_a_test_folder_alone_is_no_training_data(tmp_path: Path) -> None:
    folder = write(tmp_path, numbered("test"))
    assert len(load_images(str(folder), "test")) == 6
    assert "must have a train split beside test" in refusal(folder)


def test_links_are_followed_and_broken_ones_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", numbered("cat", count=12))
    other = write(tmp_path / "other", numbered("dog", "emu", count=3))
    (folder / "dog").symlink_to(other / "dog")
    (folder / "cat" / "one more.png").symlink_to(other / "emu" / "0.png")
    (folder / "cat" / "gone.png").symlink_to(other / "nothing.png")
    (folder / "cat" / "round").symlink_to(folder)
    (other / "dog" / "round").symlink_to(other / "emu")
    (other / "emu" / "round").symlink_to(other / "dog")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"")
    counts, names, (text,) = opened(folder)
    # 13 cats, 3 dogs, and 3 emus through the link in dogs; the link from there back to dogs is not followed.
    assert sum(counts.values()) == 19 and names == ("cat", "dog")
    assert text == (
        "left out: 1 × broken link (cat/gone.png), 2 × link to a folder above it (cat/round), "
        "1 × name that is not UTF-8 (\udcff.png)"
    )


def test_pictures_keep_the_order_and_the_numbers_of_imagefolder(tmp_path: Path) -> None:
    """`datasets` sorts by path; where its `imagefolder` is right, the result must be the same."""
    files = numbered("train/a b", "train/a", "train/a-b", "train/Z", count=3)
    folder = write(tmp_path / "data", files + [file.replace("train", "test") for file in files])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="test", cache_dir=str(tmp_path))
    ours = load_images(str(folder), "test")
    assert [image.getpixel((0, 0)) for image in theirs["image"]] == ours.pixels[:, 0, 0, 0].tolist()
    assert theirs["label"] == ours.labels.tolist() and theirs.features["label"].names == list(ours.class_names)


def test_ten_thousand_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a/0.png", "b/0.png"])
    for index in range(1, 5000):
        os.link(tmp_path / "a" / "0.png", tmp_path / "a" / f"{index}.png")
        os.link(tmp_path / "b" / "0.png", tmp_path / "b" / f"{index}.png")
    scans = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: scans.append(place) or scandir(place))
    monkeypatch.setattr(os, "stat", lambda *_, **__: pytest.fail("a file was asked for its size or date"))
    from ot_diffusers.data.pictures import list_folder, picture_tables

    tables = picture_tables(list_folder(tmp_path))
    monkeypatch.undo()
    assert len(tables["train"]) == 10_000 and len(scans) == 3


# --- Metadata ---------------------------------------------------------------------------------------------------------


def describe(folder: Path, rows: list[dict[str, object]], name: str = "metadata.jsonl") -> None:
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return
    table = datasets.Dataset.from_list(rows)
    table.to_csv(folder / name) if name.endswith(".csv") else table.to_parquet(folder / name)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_label_the_pictures(name: str, tmp_path: Path) -> None:
    write(tmp_path, numbered("", "more", count=12))
    rows = [{"file_name": f"{11 - index}.png", "label": "xyz"[index % 3], "size": index} for index in range(12)]
    describe(tmp_path, [*rows, {"file_name": "more/3.png", "label": "y", "size": 0}], name)
    counts, names, (text,) = opened(tmp_path)
    assert sum(counts.values()) == 13 and names == ("x", "y", "z")
    assert text == "left out: 11 × picture without a metadata row (more/0.png)"
    train = load_images(str(tmp_path))
    # Row k contains picture 11 − k, whose pixels have that value; the last row contains picture 12 + 3.
    expected = {11 - index: index % 3 for index in range(12)} | {15: 1}
    assert [expected[value] for value in train.pixels[:, 0, 0, 0].tolist()] == train.labels.tolist()
    assert load_images(str(tmp_path), label_column="size").class_names == tuple(map(str, range(12)))


def test_metadata_in_every_split(tmp_path: Path) -> None:
    write(tmp_path, numbered("train", "test", count=12))
    for split in ("train", "test"):
        rows = [{"file_name": f"{index}.png", "label": index % 2} for index in range(12)]
        describe(tmp_path / split, [*rows, {"file_name": "12.png", "label": 0}, {"file_name": "../x", "label": 0}])
    counts, names, (text,) = opened(tmp_path)
    assert tuple(counts.values()) == (11, 1, 12) and names == ("0", "1")
    assert text == "left out: 4 × metadata row without a picture (test/12.png)"


def test_metadata_of_something_else_are_counted(tmp_path: Path) -> None:
    write(tmp_path, numbered("a", "b"))
    describe(tmp_path, [{"isic_id": "7", "age": 40}], "metadata.csv")
    counts, names, (text,) = opened(tmp_path)
    assert sum(counts.values()) == 12 and names == ("a", "b")
    assert text == "left out: 1 × metadata file without file_name (metadata.csv)"


def test_two_columns_of_pictures(tmp_path: Path) -> None:
    write(tmp_path, numbered("", "masks", count=12))
    rows = [{"mask_file_name": f"masks/{index}.png", "file_name": f"{index}.png"} for index in range(12)]
    describe(tmp_path, rows)
    assert load_images(str(tmp_path)).pixels.max() < 12 <= load_images(str(tmp_path), image_column="mask").pixels.min()


@pytest.mark.parametrize("content", ["{", "[1]\n", "", '{"file_name": 1}\n{"file_name": "a"}\n'])
def test_unreadable_metadata_are_named(content: str, tmp_path: Path) -> None:
    write(tmp_path, numbered(""))
    (tmp_path / "metadata.jsonl").write_text(content)
    assert re.search(r"must have readable metadata, got '.*metadata\.jsonl'", refusal(tmp_path))


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(folder: Path, files: Sequence[str]) -> Path:
    for file in files:
        table = datasets.Dataset.from_dict({"image": [PIL.Image.new("L", (4, 4))] * 12})
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / file)
    return folder


# Files; images in train, validation and test; pattern of the warning. Each table has 12 images.
TABLES: dict[str, tuple[list[str], tuple[int, int, int], str | None]] = {
    "one table": (["data.parquet"], CUT[12], None),
    "one table with a word in its name": (["my_test_set.parquet"], CUT[12], None),
    "one table of validation in its name": (["crash dev.parquet"], CUT[12], None),
    "one training table": (["train.parquet"], CUT[12], None),
    "two tables": (["train.parquet", "test.parquet"], (11, 1, 12), None),
    "shards": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], CUT[24], None),
    "folders": (["train/0.parquet", "test/0.parquet"], (11, 1, 12), None),
    "a table left out": (["train.parquet", "test.parquet", "more.parquet"], (11, 1, 12), r"1 × \.parquet \(more"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_by_their_names(case: str, tmp_path: Path) -> None:
    files, sizes, expected = TABLES[case]
    counts, _, texts = opened(tables(tmp_path / "data", files))
    assert tuple(counts.values()) == sizes
    assert [bool(re.search(expected or "", text)) for text in texts] == [True] * (expected is not None)


def test_tables_and_pictures_do_not_mix(tmp_path: Path) -> None:
    """In the Hub's layout `data/train-…-of-…` the tables count; otherwise the user has to decide."""
    hub = write(tables(tmp_path / "hub", ["data/train-00000-of-00001.parquet"]), ["thumbnail.png"])
    counts, _, (text,) = opened(hub)
    assert tuple(counts.values()) == CUT[12] and text == "left out: 1 × .png (thumbnail.png)"
    mixed = write(tables(tmp_path / "mixed", ["embeddings.parquet", "more.parquet"]), numbered(""))
    assert "`dataset` must hold pictures or tables, not both, got" in refusal(mixed)
    few = write(tables(tmp_path / "few", ["embeddings.parquet"]), numbered(""))
    assert "`dataset` must hold pictures or tables, not both, got" in refusal(few)
    both = tables(tmp_path / "both", ["train_test.parquet", "train.parquet"])
    assert "`dataset` must have each file in one split, got" in refusal(both)


def test_a_readme_decides(tmp_path: Path) -> None:
    """The README assigns files to splits, as in data sets on the Hub."""
    write(tmp_path, numbered("a", count=12) + numbered("b", count=5))
    configs = (
        "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: a/*}\n  - {split: test, path: b/*}"
    )
    (tmp_path / "README.md").write_text(f"---\n{configs}\n---\n")
    assert tuple(opened(tmp_path)[0].values()) == (11, 1, 5)
    (tmp_path / "README.md").write_bytes(b"---\n\xff: [\n---\n")
    assert sum(opened(tmp_path)[0].values()) == 17


def test_a_zip_of_pictures_is_a_data_set(tmp_path: Path) -> None:
    import zipfile

    write(tmp_path / "files", numbered("", count=12))
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "crash test.zip", "w") as archive:
        for file in (tmp_path / "files").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "files"))
    counts, names, texts = opened(tmp_path / "data")
    assert tuple(counts.values()) == CUT[12] and names is None and not texts


# --- `evaluate FOLDER` ------------------------------------------------------------------------------------------------


def test_evaluate_reads_what_the_data_set_reads(tmp_path: Path) -> None:
    """200 digits give the same result as 8-bit PNG, 16-bit PNG and TIFF, rotated with an EXIF orientation, or in class
    folders."""
    import numpy as np

    digits = load_images("digits", "test").pixels[:200]
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    turn = PIL.Image.Transpose.ROTATE_90
    for index, digit in enumerate(digits):
        picture = PIL.Image.fromarray(digit[0].numpy())
        deep = PIL.Image.fromarray(digit[0].numpy().astype(np.uint16) * 257)
        for name, (kind, options) in {
            "plain/{}.png": (picture, {}),
            "deep/{}.png": (deep, {}),
            "tiff/{}.tif": (deep, {}),
            "gif/{}.gif": (picture, {}),
            "turned/{}.png": (picture.transpose(turn), {"exif": exif}),
            f"classes/{index // 100}/{{}}.PNG": (picture, {}),
        }.items():
            file = tmp_path / name.format(f"{index:05d}")
            file.parent.mkdir(parents=True, exist_ok=True)
            kind.save(file, **options)
    for folder in tmp_path.iterdir():
        assert torch.equal(read_images(folder, 1), digits), folder
    save_images(digits, tmp_path / "sampled")
    assert torch.equal(read_images(tmp_path / "sampled", 1), digits)


@pytest.mark.slow
def test_evaluate_refuses_in_one_line(tmp_path: Path, evaluator: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", ["a/0.png", "b.txt"])
    write(tmp_path / "sizes", numbered(""))
    PIL.Image.new("L", (5, 4)).save(tmp_path / "sizes" / "9.png")
    write(tmp_path / "damaged", numbered("a"))
    (tmp_path / "damaged" / "a" / "3.png").write_bytes(b"")
    for name, expected in {
        "one": "`images` must be a saved pipeline, or a folder with at least 2 pictures",
        "sizes": "`images` must hold images of one shape, here 1×4×4, got image 6",
        "damaged": "`images` must hold readable images, got image 3",
    }.items():
        assert main(["evaluate", str(tmp_path / name), "--dataset", "digits", "--evaluator", evaluator]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {expected}") and line.count("\n") == 1, line
