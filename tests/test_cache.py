"""Cached tensors are read back unchanged, or computed again with a warning; never wrong contents or an exception."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ot_diffusers.cache import cache_folder, read_verified, remembered, save_aside

TENSORS: dict[str, Tensor] = {
    "features": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(4.0).bfloat16(),
    "rows": torch.arange(6).view(2, 3),
    "whether": torch.tensor([True, False]),
    "scale": torch.tensor(2.5),
    "none": torch.zeros(0, 7),
}


def same(actual: dict[str, Tensor] | None) -> bool:
    return (
        actual is not None
        and actual.keys() == TENSORS.keys()
        and all(
            actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in TENSORS.items()
        )
    )


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    save_aside(TENSORS | {"turned": torch.arange(6).view(2, 3).T}, tmp_path / "a.safetensors")
    actual = read_verified(tmp_path / "a.safetensors")
    assert actual is not None and torch.equal(actual.pop("turned"), torch.arange(6).view(2, 3).T)
    assert same(actual)
    assert read_verified(tmp_path / "b.safetensors") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_no_flipped_bit_is_believed(tmp_path: Path) -> None:
    """A change without effect on the contents, such as a space in the header, may pass; changed contents may not."""
    file = tmp_path / "a.safetensors"
    save_aside(TENSORS, file)
    content = file.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        file.write_bytes(bytes(changed))
        actual = read_verified(file)
        assert actual is None or same(actual), position


def test_no_length_is_believed_but_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_aside(TENSORS, file)
    content = file.read_bytes()
    for other in [content[:length] for length in range(0, len(content), 7)] + [content + b"\0", content * 2]:
        file.write_bytes(other)
        assert read_verified(file) is None


def without_checksum(file: Path) -> None:
    save_file(load_file(file), file)


def of_another_key(file: Path) -> None:
    save_aside({"features": torch.zeros(5, 3)}, file.with_name("other.safetensors"))
    os.replace(file.with_name("other.safetensors"), file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("absent"))


DAMAGE: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_text("PK: a zip, perhaps"),
    of_another_key,
    a_folder,
    a_dangling_link,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_computed_again_with_a_warning(
    damage: Callable[[Path], object], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remembered("features", "key", lambda: TENSORS)
    file = cache / "features" / "key.safetensors"
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert same(remembered("features", "key", lambda: TENSORS))
    assert "is damaged" in caplog.text and "is computed again" in caplog.text
    caplog.clear()
    if not file.is_dir():  # a file cannot replace a folder
        assert same(remembered("features", "key", dict))
        assert not caplog.text


def test_what_has_no_checksum_is_computed_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    remembered("features", "key", lambda: TENSORS)
    without_checksum(cache / "features" / "key.safetensors")
    other = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
    actual = remembered("features", "key", lambda: other)
    assert all(torch.equal(actual[name], tensor) for name, tensor in other.items()) and not caplog.text


@pytest.mark.parametrize("place", ["file", "file/below", "dev"])
def test_a_folder_that_cannot_be_written_to_is_done_without(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", "/dev/null/cache" if place == "dev" else str(tmp_path / place))
    for key in ("first", "second"):
        assert same(remembered(f"kind of {key}", key, lambda: TENSORS))
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert warning.startswith("results are not cached in") and "OT_DIFFUSERS_CACHE" in warning
    assert (tmp_path / "file").read_text() == "in the way" and len(list(tmp_path.iterdir())) == 1


def test_errors_of_the_computation_stay_errors(cache: Path) -> None:
    def compute() -> dict[str, Tensor]:
        raise OSError("no such data")

    with pytest.raises(OSError, match="no such data"):
        remembered("features", "key", compute)


def test_an_empty_variable_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "ot_diffusers"
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"


def write_and_read(file: Path) -> None:
    for _ in range(100):
        save_aside({"features": torch.full((1000,), 7.0)}, file)
        actual = read_verified(file)
        assert actual is not None and bool((actual["features"] == 7).all())


def test_several_writers_and_readers_at_once(tmp_path: Path) -> None:
    file = tmp_path / "shared" / "key.safetensors"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_and_read, args=(file,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in file.parent.iterdir()] == ["key.safetensors"]
