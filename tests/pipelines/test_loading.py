"""Saved pipelines in a fresh interpreter, from a folder and from a Hub that the real client talks to.

One interpreter serves many checks: starting one is what takes the time.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from makers.loopback_hub import LoopbackHub
from makers.models import make_guided, make_truncated, make_unet

from ot_diffusers import (
    GaussianPrior,
    OTGuidedDDIMPipeline,
    ReferenceBank,
    TruncatedPriorPipeline,
)

pytestmark = pytest.mark.slow

PRELUDE = """
import json, os, sys, urllib.request
checks = {}
endpoint, folder = os.environ["HF_ENDPOINT"], os.environ["FOLDER"]
def parts(pipe): return {name: type(part).__name__ for name, part in pipe.components.items()}
def raised(call):
    try: call()
    except Exception as error: return f"{type(error).__name__}: {error}"
def requests(): return len(json.load(urllib.request.urlopen(endpoint + "/test/requests")))
def pixels(pipe, **call):
    import torch
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=16, num_inference_steps=2, generator=generator, output_type="np", **call).images
    return float(abs(images).sum())
"""
GUIDED = {
    "unet": "UNet2DModel",
    "scheduler": "DDIMScheduler",
    "feature_extractor": "ConvFeatureExtractor",
    "reference_bank": "ReferenceBank",
    "guidance_field": "NoneType",
    "vae": "NoneType",
}
TRUNCATED = {
    "prior": "PriorGenerator",
    "unet": "UNet2DModel",
    "scheduler": "DDIMScheduler",
    "feature_extractor": "NoneType",
    "reference_bank": "NoneType",
    "guidance_field": "NoneType",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`guided` with an fp16 variant beside the float32 weights, `truncated`, and a stock `ddim`."""
    folder = tmp_path_factory.mktemp("saved")
    make_guided().save_pretrained(folder / "guided")
    make_guided().to(torch.float16).save_pretrained(folder / "guided", variant="fp16")
    make_truncated().save_pretrained(folder / "truncated")
    make_guided(seed=2).save_pretrained(folder / "older")
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder / "ddim")
    # A repository whose weights are pickles, and one that would run code if it could.
    pickled = folder / "pickled"
    make_guided().save_pretrained(pickled)
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with (pickled / "unet" / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(str(folder / "exploded")), file)
    return folder


class Bomb:
    """Unpickling creates a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    hub.add("user/guided", folder / "older", branch="v1")
    for name in ("guided", "truncated", "ddim", "pickled"):
        hub.add(f"user/{name}", folder / name)
    yield hub
    hub.close()


def run_fresh(code: str, hub: LoopbackHub, folder: Path, cache: Path) -> dict[str, Any]:
    """`checks` of a script in an interpreter of its own, with an empty cache and this Hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "FOLDER": str(folder)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    script = PRELUDE + textwrap.dedent(code) + "\nprint(json.dumps(checks))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported(hub: LoopbackHub, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What loads where the package was imported, before diffusers was."""
    code = """
    import ot_diffusers
    assert "diffusers" not in sys.modules
    import torch
    from diffusers import DDPMScheduler, DDIMPipeline, DDPMPipeline, DiffusionPipeline
    from ot_diffusers import *

    for name, kind in (("guided", OTGuidedDDIMPipeline), ("truncated", TruncatedPriorPipeline)):
        for place in (f"user/{name}", f"{folder}/{name}"):
            own, generic = kind.from_pretrained(place), DiffusionPipeline.from_pretrained(place)
            checks[f"{place} own"], checks[f"{place} generic"] = parts(own), parts(generic)
            checks[f"{place} alike"] = type(generic) is kind and pixels(own) == pixels(generic)

    guided = OTGuidedDDIMPipeline.from_pretrained("user/guided")
    plain = DDIMPipeline.from_pretrained("user/guided")
    checks["plain is unguided"] = pixels(guided, guidance_scale=0) == pixels(plain) != pixels(guided)
    old = OTGuidedDDIMPipeline.from_pretrained("user/guided", revision="v1")
    checks["revision differs"] = pixels(old) != pixels(guided)
    checks["unknown revision"] = raised(lambda: OTGuidedDDIMPipeline.from_pretrained("user/guided", revision="v9"))
    checks["unknown repository"] = raised(lambda: OTGuidedDDIMPipeline.from_pretrained("user/nothing"))

    half = DiffusionPipeline.from_pretrained("user/guided", variant="fp16", dtype=torch.float16)
    checks["fp16"] = [str(half.unet.dtype), str(half.reference_bank.dtype)]
    checks["fp16 downloaded"] = sorted({os.path.basename(f) for _, _, fs in os.walk(os.environ["HF_HOME"]) for f in fs
                                        if f.endswith("safetensors")})
    checks["dtype"] = str(TruncatedPriorPipeline.from_pretrained(f"{folder}/truncated", dtype=torch.bfloat16).dtype)

    bank = ReferenceBank.from_pretrained("user/guided", subfolder="reference_bank")
    network = ConvFeatureExtractor.from_pretrained(f"{folder}/guided", subfolder="feature_extractor")
    prior = PriorGenerator.from_pretrained("user/truncated", subfolder="prior")
    checks["parts alone"] = [list(bank.features.shape), network.config.feature_dim, prior.config.latent_dim]
    swapped = OTGuidedDDIMPipeline.from_pretrained("user/guided", scheduler=DDPMScheduler(), feature_extractor=network)
    unet, scheduler = guided.unet, DDPMScheduler()
    generic = DiffusionPipeline.from_pretrained("user/guided", unet=unet, scheduler=scheduler)
    checks["passed parts"] = [swapped.feature_extractor is network, type(swapped.scheduler).__name__,
                              generic.unet is unet, generic.scheduler is scheduler]
    checks["parts left out"] = parts(
        OTGuidedDDIMPipeline.from_pretrained("user/guided", feature_extractor=None, reference_bank=None)
    )
    half = {"reference_bank": None}
    checks["half of the parts"] = raised(lambda: OTGuidedDDIMPipeline.from_pretrained("user/guided", **half))

    stock = DDIMPipeline.from_pretrained("user/ddim")
    for kind, scheduler in ((DDIMPipeline, stock.scheduler), (DDPMPipeline, DDPMScheduler())):
        pipe = OTGuidedDDIMPipeline.from_pipe(kind(stock.unet, scheduler), feature_extractor=network,
                                              reference_bank=bank)
        checks[f"from_pipe {kind.__name__}"] = parts(pipe)
        checks[f"from_pipe {kind.__name__} guides"] = pixels(pipe) != pixels(pipe, guidance_scale=0)
    checks["back to stock"] = parts(DDIMPipeline.from_pipe(guided))

    for place in ("user/pickled", f"{folder}/pickled"):
        for kind in (OTGuidedDDIMPipeline, DiffusionPipeline):
            checks[f"{place} {kind.__name__}"] = raised(lambda: kind.from_pretrained(place))
    checks["exploded"] = os.path.exists(f"{folder}/exploded")
    checks["code ran"] = any("transformers_modules" in name or "diffusers_modules" in name for name in sys.modules)

    before = requests()
    checks["local only"] = parts(OTGuidedDDIMPipeline.from_pretrained("user/guided", local_files_only=True))
    checks["local only, requests"] = requests() - before
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    checks["offline"] = parts(DiffusionPipeline.from_pretrained("user/truncated"))
    """
    return run_fresh(code, hub, folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def not_imported(hub: LoopbackHub, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What loads where nobody has imported the package: first without having it, then by the repository's own code."""
    code = """
    sys.modules["ot_diffusers"] = None  # as if it were not installed
    from diffusers import DDIMPipeline, DiffusionPipeline
    for place in ("user/guided", f"{folder}/guided"):
        checks[f"{place} plain"] = parts(DDIMPipeline.from_pretrained(place))
    checks["without the package"] = raised(lambda: DiffusionPipeline.from_pretrained("user/guided"))

    del sys.modules["ot_diffusers"]
    route = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    refused = {"custom_pipeline": "pipeline"}
    checks["without consent"] = raised(lambda: DiffusionPipeline.from_pretrained("user/guided", **refused))
    assert "ot_diffusers" not in sys.modules
    for name in ("guided", "truncated"):
        for place in (f"user/{name}", f"{folder}/{name}"):
            checks[f"{place} custom"] = parts(DiffusionPipeline.from_pretrained(place, **route))
            by_id = route | {"custom_pipeline": place}
            checks[f"{place} by id"] = parts(DiffusionPipeline.from_pretrained(place, **by_id))
    # diffusers came first: importing the package registered its pipelines at once.
    checks["registered late"] = parts(DiffusionPipeline.from_pretrained("user/guided"))
    """
    return run_fresh(code, hub, folder, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("place", ["user/{}", "{folder}/{}"], ids=["hub", "folder"])
def test_pipelines_load_by_their_own_class_and_by_diffusers(place: str, imported: dict[str, Any], folder: Path) -> None:
    for name, expected in (("guided", GUIDED), ("truncated", TRUNCATED)):
        path = place.format(name, folder=folder)
        assert imported[f"{path} own"] == imported[f"{path} generic"] == expected
        assert imported[f"{path} alike"]


def test_revisions(imported: dict[str, Any]) -> None:
    assert imported["revision differs"]
    assert "user/guided" in imported["unknown revision"]
    assert "user/nothing" in imported["unknown repository"]


def test_variants_and_dtypes(imported: dict[str, Any]) -> None:
    assert imported["fp16"] == ["torch.float16"] * 2
    assert "diffusion_pytorch_model.fp16.safetensors" in imported["fp16 downloaded"]
    assert imported["dtype"] == "torch.bfloat16"


def test_parts_alone_and_parts_replaced(imported: dict[str, Any]) -> None:
    assert imported["parts alone"] == [[50, 16], 16, 4]
    assert imported["passed parts"] == [True, "DDPMScheduler", True, True]
    assert imported["parts left out"] == GUIDED | {"feature_extractor": "NoneType", "reference_bank": "NoneType"}
    assert "`reference_bank` must accompany `feature_extractor`, got None" in imported["half of the parts"]


def test_from_pipe_both_ways(imported: dict[str, Any]) -> None:
    assert imported["from_pipe DDIMPipeline"] == GUIDED
    assert imported["from_pipe DDPMPipeline"] == GUIDED | {"scheduler": "DDPMScheduler"}
    assert imported["from_pipe DDIMPipeline guides"] and imported["from_pipe DDPMPipeline guides"]
    assert imported["back to stock"] == {"unet": "UNet2DModel", "scheduler": "DDIMScheduler"}


def test_the_cache_is_enough_without_the_hub(imported: dict[str, Any]) -> None:
    assert imported["local only"] == GUIDED
    assert imported["local only, requests"] == 0
    assert imported["offline"] == TRUNCATED


def test_neither_pickles_nor_code_are_run(imported: dict[str, Any], folder: Path) -> None:
    for place in ("user/pickled", f"{folder}/pickled"):
        assert imported[f"{place} OTGuidedDDIMPipeline"] is not None
        assert imported[f"{place} DiffusionPipeline"] is not None
    assert not imported["exploded"]
    assert not imported["code ran"]


@pytest.mark.parametrize("place", ["user/guided", "{folder}/guided"], ids=["hub", "folder"])
def test_a_guided_repository_is_a_plain_pipeline_without_the_package(
    place: str, imported: dict[str, Any], not_imported: dict[str, Any], folder: Path
) -> None:
    plain = {"unet": "UNet2DModel", "scheduler": "DDIMScheduler"}
    assert not_imported[f"{place.format(folder=folder)} plain"] == plain
    assert imported["plain is unguided"]
    assert "OTGuidedDDIMPipeline" in not_imported["without the package"]


@pytest.mark.parametrize("place", ["user/{}", "{folder}/{}"], ids=["hub", "folder"])
def test_the_custom_pipeline_route_asks_for_consent_and_imports_the_package(
    place: str, not_imported: dict[str, Any], folder: Path
) -> None:
    assert "trust_remote_code" in not_imported["without consent"]
    for name, expected in (("guided", GUIDED), ("truncated", TRUNCATED)):
        path = place.format(name, folder=folder)
        assert not_imported[f"{path} custom"] == not_imported[f"{path} by id"] == expected
    assert not_imported["registered late"] == GUIDED


@pytest.mark.parametrize("name", ["guided", "truncated"])
def test_saved_again_is_the_same_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    kind = {"guided": OTGuidedDDIMPipeline, "truncated": TruncatedPriorPipeline}[name]
    first, again = tmp_path / "first", tmp_path / "again"
    kind.from_pretrained(folder / name).save_pretrained(first)
    kind.from_pretrained(first).save_pretrained(again)
    contents = [{str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
                for root in (folder / name, first, again)]  # fmt: skip
    assert contents[1] == contents[2]
    assert contents[1].items() <= contents[0].items()  # the folder has a variant besides
    assert str(tmp_path).encode() not in b"".join(contents[2].values())


def test_a_folder_saved_with_modules_still_loads(folder: Path, tmp_path: Path) -> None:
    make_guided().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["feature_extractor"][0] = "ot_diffusers.models.feature_extractor"
    index["reference_bank"][0] = "ot_diffusers.models.reference_bank"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert isinstance(OTGuidedDDIMPipeline.from_pretrained(tmp_path).reference_bank, ReferenceBank)


def test_a_recorded_guidance_field_is_saved_with_its_pipeline(tmp_path: Path) -> None:
    pipeline = make_guided()
    pipeline.set_progress_bar_config(disable=True)
    field = pipeline.record_guidance_field(16, num_inference_steps=3)
    pipeline.save_pretrained(tmp_path)
    loaded = OTGuidedDDIMPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.guidance_field.features, field.features)


def test_a_subfolder_is_read_from_the_subfolder(tmp_path: Path) -> None:
    features = torch.arange(8.0).view(2, 4)
    ReferenceBank.from_features(features).save_pretrained(tmp_path / "reference_bank")
    ReferenceBank.from_features(-features).save_pretrained(tmp_path)
    assert torch.equal(ReferenceBank.from_pretrained(tmp_path, subfolder="reference_bank").features, features)


def test_a_model_alone_reads_a_pickle_only_if_told_to(tmp_path: Path) -> None:
    prior = GaussianPrior(truncation_timestep=10, sample_size=2, out_channels=1)
    prior.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()  # what was written all the same
    torch.save(prior.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):
        GaussianPrior.from_pretrained(tmp_path)
    assert GaussianPrior.from_pretrained(tmp_path, use_safetensors=False).config.truncation_timestep == 10
