"""Shared by all tests: no network, no traces outside temporary folders, real data sets where they are at hand."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before any test module imports the libraries that read these; commands started by tests inherit them.
_CACHE = tempfile.TemporaryDirectory(prefix="ot_diffusers_tests_")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ["OT_DIFFUSERS_CACHE"] = _CACHE.name
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes of a small machine
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# No time limit per example, as a busy machine is not an error; the same examples in every run.
settings.register_profile("ot_diffusers", deadline=None, derandomize=True)
settings.load_profile("ot_diffusers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not marked as slow is fast."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Commands that are run in this process leave their handlers behind when they are done."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def accelerate_state() -> Iterator[None]:
    """accelerate keeps its settings for the life of a process; the next module of tests begins without them."""
    yield
    if "accelerate.state" in sys.modules:
        from makers.runs import reset_accelerate

        reset_accelerate()


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes in bfloat16, whatever this one does."""
    import torch

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what the package keeps."""
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def real_datasets() -> Path:
    """The folder that holds `mnist/` and `cifar10/` in their Hub layouts; the test is skipped where there is none."""
    folder = os.environ.get("OT_DIFFUSERS_DATASETS")
    if not folder:
        pytest.skip("OT_DIFFUSERS_DATASETS names no folder with mnist/ and cifar10/")
    return Path(folder)


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A feature network for the digits as it is born: enough where only the machinery around it is tested."""
    import torch

    from ot_diffusers import ConvFeatureExtractor
    from ot_diffusers.data import load_images

    torch.manual_seed(0)
    fingerprint = load_images("digits", "train").fingerprint
    network = ConvFeatureExtractor(
        sample_size=8, feature_dim=8, block_out_channels=(4, 8), data_fingerprint=fingerprint
    )
    folder = tmp_path_factory.mktemp("evaluator")
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub that this process' client talks to, as someone who may write."""
    from huggingface_hub import constants, file_download, utils
    from makers.loopback_hub import WRITER, LoopbackHub

    hub = LoopbackHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Before version 1 the client's sessions remember that they were offline.
    getattr(utils, "reset_sessions", lambda: None)()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield hub
    hub.close()
