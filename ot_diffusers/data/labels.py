"""Class labels: one numbering for all splits of a data set, or a message that says why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, require

if TYPE_CHECKING:
    import datasets

LABEL_COLUMNS = ("label", "labels")


class LabelReader:
    """Numbers the classes of a column of integers, strings or booleans from 0 to K − 1.

    The classes are those of all splits in sorted order, even if one split lacks some of them. A column of type
    `datasets.ClassLabel` keeps its own numbers. Missing values and negative numbers (the Hub's "no label") are not
    labels.

    Args:
        tables: the splits.
        label_column: name of the column; by default `label`, else `labels`.

    Raises:
        InputError: the named column is in no split or has another type.

    Attributes:
        class_names: K names; None without such a column.
        problem: why a classifier cannot be trained on these labels, as the message of an `InputError`; else None.
    """

    def __init__(self, tables: datasets.DatasetDict, label_column: str | None) -> None:
        self.class_names: tuple[str, ...] | None = None
        self.problem: str | None = None
        self.codes: dict[Any, int] = {}
        columns = list(dict.fromkeys(name for table in tables.values() for name in table.column_names))
        exists = label_column is None or label_column in columns
        require(exists, "label_column", f"be one of the columns {', '.join(columns)}", label_column)
        self.column = label_column or next((name for name in LABEL_COLUMNS if name in columns), "")
        if not self.column:
            self.problem = f"`label_column` must name a column with class labels, got none among {', '.join(columns)}"
            return
        self.problem = self._number_classes([table for table in tables.values() if self.column in table.column_names])
        if label_column is not None and self.class_names is None:
            raise InputError(str(self.problem))

    def read(self, table: datasets.Dataset) -> tuple[Tensor | None, str | None]:
        """Labels of a table, int64 [N] on the CPU or None, and their problem, if any."""
        if self.class_names is None:
            return None, self.problem
        if self.column not in table.column_names:
            return None, f"`label_column` must be in every split, got {self.column!r}"
        values = _values(table, self.column)
        row = next((row for row, value in enumerate(values) if value not in self.codes), None)
        if row is not None:
            return None, f"`label_column` must label every image, got {values[row]!r} in row {row} of {self.column!r}"
        return torch.tensor([self.codes[value] for value in values], dtype=torch.int64), self.problem

    def _number_classes(self, tables: list[datasets.Dataset]) -> str | None:
        """Set the names and numbers of the classes in the tables; returns the problem with them, if any."""
        features = [table.features[self.column] for table in tables]
        kinds = {_kind(feature) for feature in features} - {"null"}
        if len(kinds) != 1 or kinds <= {""}:
            types = " and ".join(dict.fromkeys(_type_name(feature) for feature in features))
            return f"`label_column` must hold integers, strings or booleans, got {self.column!r} of type {types}"
        values = {value for table in tables for value in _values(table, self.column) if _is_label(value)}
        named = next((feature.names for feature in features if hasattr(feature, "names")), None)
        classes = sorted(values) if named is None else range(len(named))
        self.class_names = tuple(map(str, classes if named is None else named))
        self.codes = {value: code for code, value in enumerate(classes)}
        if len(values) < 2:
            return f"`label_column` must hold at least two classes, got {sorted(values)} in {self.column!r}"
        return None


def _kind(feature: Any) -> str:
    """The kind of values in a column: named classes, numbers (or booleans), texts, null, or "" for anything else."""
    if hasattr(feature, "names"):
        return f"classes {feature.names}"
    dtype = _type_name(feature)
    if dtype.startswith(("int", "uint", "bool")):
        return "numbers"
    return {"string": "texts", "large_string": "texts", "null": "null"}.get(dtype, "")


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _values(table: datasets.Dataset, column: str) -> list[Any]:
    return table.select_columns(column).with_format("arrow")[:][column].to_pylist()


def _is_label(value: Any) -> bool:
    return value is not None and (isinstance(value, str) or value >= 0)
