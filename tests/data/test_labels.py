"""Labels of every kind: one numbering for all splits, or a one-line error if they cannot be used for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from makers.runs import TINY, exit_status, main_of

from ot_diffusers.cli import main
from ot_diffusers.config import FeaturesConfig, load_config
from ot_diffusers.data import ResidentImages, StreamedImages, load_images
from ot_diffusers.errors import InputError
from ot_diffusers.features import labels_of, load_feature_extractor, make_feature_extractor

CLASSES = datasets.ClassLabel(names=["ant", "bee", "cow"])


def table(root: Path, feature: Any = None, column: str = "label", **splits: list[Any]) -> str:
    """Grey 8×8 images and their labels in a folder of parquet files;"""
    root.mkdir(parents=True)
    for split, labels in splits.items():
        values = {"image": [PIL.Image.new("L", (8, 8), index) for index in range(len(labels))], column: labels}
        features = None if feature is None else datasets.Features({"image": datasets.Image(), column: feature})
        datasets.Dataset.from_dict(values, features).to_parquet(root / f"{split}.parquet")
    return str(root)


# Column type, labels of train and test, expected class numbers of both, names.
LABELS: dict[str, tuple[Any, list[Any], list[Any], list[int], list[int], tuple[str, ...]]] = {
    "integers": (None, [0, 1, 2, 1], [2, 0], [0, 1, 2, 1], [2, 0], ("0", "1", "2")),
    "from one": (None, [1, 2, 3], [3], [0, 1, 2], [2], ("1", "2", "3")),
    "with gaps": (None, [50000, 7, 123], [123, 7], [2, 0, 1], [1, 0], ("7", "123", "50000")),
    "small integers": (datasets.Value("uint8"), [255, 3, 3], [255], [1, 0, 0], [1], ("3", "255")),
    "large integers": (datasets.Value("uint64"), [2**62, 3], [3], [1, 0], [0], ("3", str(2**62))),
    "texts": (None, ["dog", "cat", "dog"], ["cat"], [1, 0, 1], [0], ("cat", "dog")),
    "texts of numbers": (None, ["10", "9", "1"], ["9"], [1, 2, 0], [2], ("1", "10", "9")),
    "booleans": (None, [True, False], [True, True], [1, 0], [1, 1], ("False", "True")),
    "a class of the test split": (None, ["a", "c"], ["b", "c"], [0, 2], [1, 2], ("a", "b", "c")),
    "named classes": (CLASSES, [2, 0, 0], [0, 2], [2, 0, 0], [0, 2], ("ant", "bee", "cow")),
    "named classes as texts": (CLASSES, ["cow", "bee"], ["ant"], [2, 1], [0], ("ant", "bee", "cow")),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_numbered_over_all_splits(case: str, tmp_path: Path) -> None:
    feature, train_labels, test_labels, train_numbers, test_numbers, names = LABELS[case]
    folder = table(tmp_path / "data", feature, train=train_labels, validation=train_labels, test=test_labels)
    for max_bytes, kind in ((2**20, ResidentImages), (0, StreamedImages)):
        train_images, test_images = (
            load_images(folder, split, max_resident_bytes=max_bytes) for split in ("train", "test")
        )
        assert isinstance(train_images, kind)
        assert labels_of(train_images).tolist() == train_numbers
        assert labels_of(test_images).tolist() == test_numbers
        assert train_images.class_names == test_images.class_names == names
    network = make_feature_extractor(FeaturesConfig(block_out_channels=(4, 8)), train_images)
    assert network.config.num_classes == len(names)


# Column type, labels of train and of test, the split that cannot be used, and the expected message.
PROBLEMS: dict[str, tuple[Any, list[Any], list[Any], str, str]] = {
    "no label": (None, [0, 1, -1, 1], [0, 1], "train", "must label every image, got -1 in row 2 of 'label'"),
    "no label in test": (None, [0, 1, 1], [-1, -1], "test", "must label every image, got -1 in row 0"),
    "no label with names": (CLASSES, [0, 1, 2], [-1], "test", "must label every image, got -1"),
    "null": (None, [0, 1, None], [1], "train", "must label every image, got None in row 2"),
    "null texts": (None, ["a", None, "b"], ["a"], "train", "must label every image, got None in row 1"),
    "only nulls in test": (None, ["a", "b"], [None], "test", "must label every image, got None in row 0"),
    "one class": (None, [4, 4, 4], [4], "train", "must hold at least two classes, got [4] in 'label'"),
    "one text": (None, ["cat"] * 3, ["cat"], "train", "must hold at least two classes, got ['cat']"),
    "one named class": (CLASSES, [1, 1, 1], [1], "train", "must hold at least two classes, got [1]"),
    "fractions": (
        None,
        [0.5, 1.0],
        [2.0],
        "train",
        "must hold integers, strings or booleans, got 'label' of type float64",
    ),
    "lists": (None, [[0, 1], [1]], [[0]], "train", "must hold integers, strings or booleans, got 'label'"),
    "structures": (None, [{"x": 1}], [{"x": 2}], "train", "must hold integers, strings or booleans, got 'label'"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_unusable_labels_matter_only_where_labels_do(case: str, tmp_path: Path) -> None:
    feature, train_labels, test_labels, split, expected = PROBLEMS[case]
    folder = table(tmp_path / "data", feature, train=train_labels, validation=train_labels, test=test_labels)
    images = load_images(folder, split)
    with pytest.raises(InputError) as refusal:
        labels_of(images)
    message = str(refusal.value)
    assert message.startswith("`label_column` ") and expected in message and "\n" not in message
    assert images.labels is None or len(images.labels) == len(images)


def test_columns_of_labels(tmp_path: Path) -> None:
    folder = table(tmp_path / "labels", column="labels", train=[3, 4], validation=[3], test=[4])
    assert load_images(folder).labels.tolist() == [0, 1]
    folder = table(tmp_path / "fine", column="fine_label", train=[3, 4], validation=[3], test=[4])
    assert load_images(folder).labels is None
    with pytest.raises(
        InputError, match="`label_column` must name a column with class labels, got none among image, fine_label"
    ):
        labels_of(load_images(folder))
    assert load_images(folder, label_column="fine_label").labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="`label_column` must be one of the columns image, fine_label, got 'coarse'"):
        load_images(folder, label_column="coarse")
    folder = table(tmp_path / "scores", column="score", train=[0.5, 1.5], validation=[0.5], test=[0.5])
    with pytest.raises(
        InputError, match="`label_column` must hold integers, strings or booleans, got 'score' of type float"
    ):
        load_images(folder, label_column="score")


def test_columns_of_images(tmp_path: Path) -> None:
    """The column `image` is the default; among other columns of images the user has to choose."""
    pictures = [PIL.Image.new("L", (8, 8), value) for value in (0, 1)]
    for name, columns, expected in (
        ("image", ("mask", "image"), 1),
        ("only", ("photo",), 0),
        ("img", ("text", "img"), 1),
        ("two", ("mask", "photo"), None),
    ):
        values = {column: ["a"] * 12 if column == "text" else [pictures[i]] * 12 for i, column in enumerate(columns)}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(values).to_parquet(tmp_path / name / "train.parquet")
        if expected is None:
            with pytest.raises(InputError, match="`image_column` must be given: it may be any of mask, photo"):
                load_images(str(tmp_path / name))
            continue
        assert load_images(str(tmp_path / name)).pixels.unique().tolist() == [expected]


# Labels of train and test, and the expected message; nothing is trained.
RUNS = {
    "a class in test without a label": ([0, 1] * 12, [0, -1], "got -1 in row 1"),
    "one class": ([0] * 24, [0, 0], "at least two classes"),
    "fractions": ([0.5] * 24, [1.0, 2.0], "integers, strings or booleans"),
}


@pytest.mark.parametrize("case", RUNS)
def test_training_says_so_before_it_begins(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, test_labels, expected = RUNS[case]
    folder = table(tmp_path / "data", train=labels, test=test_labels)
    assert exit_status("features", [f"dataset={folder}", "train_batch_size=2"], tmp_path / "run", monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: `label_column` must") and expected in line and not (tmp_path / "run").exists()


def test_training_by_texts(tmp_path: Path) -> None:
    folder = table(tmp_path / "data", train=["b", "a", "z"] * 8, test=["a", "z"])
    values = TINY["features"] | {"dataset": folder, "train_batch_size": 4, "max_train_steps": 2}
    main_of("features")(
        load_config(FeaturesConfig, [*(f"{k}={v}" for k, v in values.items()), f"output_dir={tmp_path}/run"])
    )
    assert load_feature_extractor(f"{tmp_path}/run").config.num_classes == 3


def test_commands_take_the_columns(tmp_path: Path, evaluator: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`truncated-set`, `stress` and `evaluate` accept the options that their messages recommend."""
    folder = table(tmp_path / "data", column="kind", train=["a", "b"] * 12, test=["a", "b"])
    export = ["truncated-set", "--dataset", folder, "--output"]
    assert main([*export, str(tmp_path / "plain")]) == 0
    assert main([*export, str(tmp_path / "set"), "--label-column", "kind", "--image-size", "4", "--channels", "3"]) == 0
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path))
    assert len(rows[0]["sample"]) == 3 and len(rows[0]["sample"][0]) == 4 and sorted(set(rows["label"])) == [0, 1]
    capsys.readouterr()
    common = ["--dataset", "digits", "--evaluator", evaluator]
    for words in (["stress"], ["evaluate", folder]):
        assert main([*words, *common, "--image-size", "9", "--output", str(tmp_path / "out")]) == 2
        assert "`image_size` must be left out, or the evaluator's 8, got 9" in capsys.readouterr().err
