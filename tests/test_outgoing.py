"""Nothing that leaves this machine tells where files lie here: every byte of what a push would send is searched."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from makers import command
from makers.models import make_guided
from makers.runs import train
from safetensors.torch import save_file

from ot_diffusers import BackboneFeatureExtractor, OTGuidedDDIMPipeline, ReferenceBank
from ot_diffusers.data import HUB_IDS, load_images
from ot_diffusers.errors import InputError
from ot_diffusers.hub.cards import DATA
from ot_diffusers.hub.push import export_run, repository_files
from ot_diffusers.outgoing import LocalPaths, outgoing_files, without_local_paths

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of somebody called müller, who works in a folder of it."""
    home = tmp_path / "people" / "müller"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "müller")
    monkeypatch.chdir(home / "work")
    return home


def held(contents: dict[str, Path | bytes], *secrets: object) -> list[str]:
    """Files with one of the words in their name or bytes."""
    words = [str(secret).encode() for secret in secrets] + [
        json.dumps(str(secret))[1:-1].encode() for secret in secrets
    ]
    found = {name: value if isinstance(value, bytes) else value.read_bytes() for name, value in contents.items()}
    return [name for name, value in found.items() if any(word in name.encode() + value for word in words)]


# --- A whole run ------------------------------------------------------------------------------------------------------


SHORT = {"max_train_steps": 2, "report_to": "tensorboard"}


def write_pictures(folder: Path, count: int = 20) -> None:
    """Two classes of `count` noisy pictures of 8×8 pixels."""
    rng = np.random.default_rng(0)
    for name in (f"{kind}/{index}.png" for kind in "ab" for index in range(count)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_whole_run_tells_no_place(
    relative: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OT_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    base = Path("clients") if relative else home / "clients"
    data, features, run = (str(base / name) for name in ("acme/mnist", "secret/f", "secret/ot"))
    write_pictures(Path(data))
    train("features", features, dataset=data, **SHORT)
    train("ot", run, dataset=data, feature_extractor=features, checkpointing_steps=1, **SHORT)
    (Path(run) / "samples" / ".env").write_text("KEY=1")
    (Path(run) / "samples" / "holiday.png").write_bytes(b"mine")
    (Path(run) / "logs" / "notes.txt").write_text("mine")
    (Path(run) / "logs" / "events.out.tfevents.1.box.2.0").write_bytes(b"\0" + data.encode())  # of an older version
    (Path(run) / "logs" / "hparams.yml").write_text(f"dataset: {data}\n")
    (Path(run) / "samples" / "update-99999999.png").symlink_to(home / "nothing")
    options = ("--dataset", data, "--evaluator", features, "--num-samples", "7", "--num-inference-steps", "2")
    assert command("evaluate", run, *options, "--output", "r.json") == 0
    if relative:  # once is enough for what takes seconds
        assert command("track", run, *options, "--output", "tracked") == 0
    written = {str(file): file for file in (Path("r.json"), *Path("tracked").glob("*.*"))}
    assert held(written, home, "clients", "acme", "secret") == []

    assert command("card", run, "--results", "r.json", "--output", "card", "--num-images", 4) == 0
    sent = outgoing_files("card")
    assert {Path(name).suffix for name in sent} >= {".md", ".json", ".jsonl", ".safetensors", ".png", ".yml"}
    assert any("tfevents" in name for name in sent)
    assert held(sent, home, tmp_path, tmp_path.name, "müller", "clients", "acme", "secret", "holiday", "KEY=1") == []
    assert set(repository_files("card")) == {str(file.relative_to("card")) for file in Path("card").rglob("*.*")
                                             if file.is_file()}  # fmt: skip
    assert (
        "logs/events.out.tfevents.1.0" not in sent and Path("card/logs/hparams.yml").read_text() == "dataset: mnist\n"
    )
    card = ModelCard.load("card/README.md")
    assert card.data.datasets is None and card.data.eval_results[0].dataset_type == "local"
    assert "MNIST" not in card.text and "mnist" not in card.text
    assert json.loads(Path("card/training/pipeline/run.json").read_text())["config"]["feature_extractor"] == "f"
    assert json.loads((Path(run) / "run.json").read_text())["config"]["dataset"] == data  # to go on with the run
    assert "update-99999999.png" in caplog.text
    OTGuidedDDIMPipeline.from_pretrained("card")


# --- Words ------------------------------------------------------------------------------------------------------------

RECORD = {
    "dataset": "clients/acme/scans",
    "output_dir": "~/runs/ot",
    "evaluator": "inception-v3-compat=deep/weights.pth",
    "feature_extractor": "/volume 1/My Runs/f",
    "overrides": ["denoiser=../old/base"],
    "data": {"hub_id": "someone/faces"},
}
WORDS = {
    "{home}/x/y.png": "y.png",
    "{home}": "~",
    "HOME={home}/a:{home}/b": "HOME=a:b",
    "see {home}/x/y.": "see y.",
    "-I{home}/include": "-Iinclude",
    "images against clients/acme/scans": "images against scans",
    "./clients/acme/scans/a.png": "a.png",
    "deep/weights.pth": "weights.pth",
    "/volume 1/My Runs/f/model": "model",
    "../old/base": "base",
    "~/anything/else": "else",
    "file:///srv/x/y": "y",
    "/home/somebody": "~",
    "/Users/somebody/x": "x",
    "/root/x": "x",
    "/mnt/disk/x": "x",
    "/lustre/müller/x": "x",
    r"C:\Users\somebody\x": "x",
    "D:/pictures/x/y": "y",
    r"\\server\share\x": "x",
}
OTHERS = [
    "someone/faces", "google/ddpm-cat-256", "ylecun/mnist", "train/loss", "and/or", "10/20", "~10/20 images",
    "https://huggingface.co/müller/model", "https://example.org/home/page", "</section>", "application/json",
    "1e-3", "myclients/acme/scans", "digits", "a ~ b", "/", "//", "scheduler/scheduler_config.json",
]  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_a_path_becomes_its_last_name(text: str, home: Path) -> None:
    assert LocalPaths([RECORD]).replaced(text.format(home=home)) == WORDS[text]


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_path_stays(text: str, home: Path) -> None:
    paths = LocalPaths([RECORD])
    assert paths.replaced(text) == text and paths.replace(text, prose=True) == text


@pytest.mark.parametrize("root", ["/", "~"])
def test_who_has_no_home_or_name_loses_no_words(root: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run as a user whom the system does not know."""
    monkeypatch.setenv("HOME", root)
    monkeypatch.setenv("LOGNAME", "nobody")
    paths = LocalPaths([{"dataset": "long/" + 300 * "x", "features": "words / and words\nin lines"}])
    for text in OTHERS:
        assert paths.replaced(text) == text and paths.replace(text, prose=True) == text
    assert paths.replace("/tmp/x/y") == "y"


def test_a_configuration_for_a_tracker_names_no_place(home: Path) -> None:
    config = {"dataset": "data/classes", "denoiser": str(home / "base"), "evaluator": "digits/evaluator.yaml",
              "output_dir": "..", "seed": 1, "learning_rate": 1e-3, "betas": [0.9, 0.95]}  # fmt: skip
    expected = config | {"dataset": "classes", "denoiser": "base"}
    assert without_local_paths(config) == expected
    assert without_local_paths(config, ["data/classes"])["dataset"] == "data/classes"


# --- Files ------------------------------------------------------------------------------------------------------------


def picture(file: Path, path: str, *, zip: bool = True) -> None:
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Source", path * 20, zip=zip)
    PIL.Image.new("L", (4, 4)).save(file, pnginfo=text)


def archive(file: Path, path: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("a.txt", path * 20)


def table(file: Path, path: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"file": [f"{path}/{i}" for i in range(99)]}), file, compression="zstd")


LEFT_OUT: dict[str, Callable[[Path, str], object]] = {
    "logs/events.out.tfevents.1.host.2.0": lambda file, path: file.write_bytes(b"\0\1" + path.encode() + b"\0"),
    "wide.bin": lambda file, path: file.write_bytes(b"\0\0\0" + path.encode("utf-16-le")),
    "plain.png": lambda file, path: picture(file, path, zip=False),
    "zipped.png": picture,
    "camera.jpg": lambda file, path: PIL.Image.new("L", (4, 4)).save(file, comment=path),
    "a.zip": archive,
    "a.npz": lambda file, path: np.savez_compressed(file, np.array([path] * 20)),
    "a.json.gz": lambda file, path: file.write_bytes(gzip.compress(path.encode() * 20)),
    "cut.json.gz": lambda file, path: file.write_bytes(gzip.compress(path.encode() * 20)[:-9]),
    "a.parquet": table,
    "a.7z": lambda file, path: file.write_bytes(b"7z\xbc\xaf\0"),
    "optimizer.pt": lambda file, path: torch.save({"folder": path}, file),
}
REWRITTEN: dict[str, Callable[[Path, str], object]] = {
    "a.json": lambda file, path: file.write_text(json.dumps({"key": [path], path: 1})),
    "a.jsonl": lambda file, path: file.write_text(f"{json.dumps({'a': path})}\n{json.dumps({'b': 1.5})}\n"),
    "a.ipynb": lambda file, path: file.write_text(json.dumps({"cells": [{"source": f"open('{path}')\n"}]})),
    "a.yaml": lambda file, path: file.write_text(f"# of {path}\na: {path}\n", encoding="utf-8"),
    "quoted.yml": lambda file, path: file.write_text(json.dumps({"a": path}), encoding="utf-8"),
    "damaged.json": lambda file, path: file.write_text(f'{{"a": {json.dumps(path)}', encoding="utf-8"),
    "a.csv": lambda file, path: file.write_text(f"name,file\na,{path}\n", encoding="utf-8"),
    "a.html": lambda file, path: file.write_text(f"<p>{path}</p>", encoding="utf-8"),
    "wide.txt": lambda file, path: file.write_text(path, encoding="utf-16"),
    "marked.txt": lambda file, path: file.write_text(path, encoding="utf-8-sig"),
    "notes.md": lambda file, path: file.write_text(f"From `{path}`, [there](file://{path}).", encoding="utf-8"),
    "run.sh": lambda file, path: file.write_text(f"cd {path} && ls", encoding="utf-8"),
}


@pytest.mark.parametrize("name", [*LEFT_OUT, *REWRITTEN])
def test_every_kind_of_file_is_looked_into(
    name: str, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = tmp_path / "model", str(home / "clients" / "scans")
    (folder / name).parent.mkdir(parents=True)
    (LEFT_OUT | REWRITTEN)[name](folder / name, path)
    sent = outgoing_files(folder)
    assert sent.keys() == ({name} if name in REWRITTEN else set())
    assert held(sent, home, "clients", path.encode("utf-16-le")) == []
    warned = not name.endswith((".json", ".jsonl", ".ipynb", ".yaml", ".yml"))
    assert [name in record.getMessage() for record in caplog.records] == [True] * warned
    if name == "a.jsonl":
        assert [json.loads(line) for line in sent[name].splitlines()] == [{"a": "scans"}, {"b": 1.5}]
    if name == "a.yaml":
        assert yaml.safe_load(sent[name]) == {"a": "scans"}


@pytest.mark.parametrize("name", [*LEFT_OUT, *REWRITTEN])
def test_files_without_a_path_go_as_they_are(name: str, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (LEFT_OUT | REWRITTEN)[name](folder / name, "a word")
    goes = name not in ("a.7z", "cut.json.gz")  # nobody can look into these
    expected = {name.replace(".host.2.0", ".0"): folder / name} if goes else {}
    if name != "notes.md":  # it has an address of a file
        assert outgoing_files(folder) == expected


def test_weights_are_refused_for_a_path_in_their_header(home: Path, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2)}
    file = tmp_path / "unet.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    assert outgoing_files(tmp_path / ".").keys() >= {"unet.safetensors"}
    save_file(weights, file, metadata={"training": json.dumps({"data": str(home / "scans")})})
    with pytest.raises(InputError, match=r"`folder` must hold weights without local paths .* save them again"):
        outgoing_files(tmp_path)


LINKS = {
    "to a file elsewhere": ("a.txt", "../private.txt"),
    "to a folder": ("unet", "../elsewhere"),
    "to a folder inside": ("copy", "inside"),
    "to nothing": ("a.png", "gone.png"),
    "to a hidden file": ("settings", ".env"),
}


@pytest.mark.parametrize("case", LINKS)
def test_no_link_leads_to_other_files(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for file in (folder / ".env", folder / "inside" / "b.txt", tmp_path / "private.txt", tmp_path / "elsewhere" / "c"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    (folder / "shown.txt").symlink_to("inside/b.txt")
    assert outgoing_files(folder).keys() == {"shown.txt", "inside/b.txt"}
    name, target = LINKS[case]
    (folder / name).symlink_to(target)
    with pytest.raises(InputError, match=f"`folder` must hold files, not links .*{name}"):
        outgoing_files(folder)


def test_a_link_of_a_run_is_left_out(tmp_path: Path) -> None:
    make_guided().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "update-00000001.png").symlink_to(tmp_path / "gone")
    export_run(tmp_path / "run", tmp_path / "card", num_images=0)
    assert not (tmp_path / "card" / "samples").exists()


# --- Parts and data sets ----------------------------------------------------------------------------------------------


def test_a_saved_part_does_not_tell_where_it_was_loaded_from(home: Path) -> None:
    """diffusers writes that into `config.json`, and transformers into the configuration of a backbone."""
    make_guided().save_pretrained("first")
    bank = ReferenceBank.from_pretrained("first", subfolder="reference_bank")
    bank.save_pretrained("bank")
    OTGuidedDDIMPipeline.from_pretrained(home / "work" / "first").save_pretrained("second")
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
           "patch_size": 8, "_name_or_path": str(home / "vit")}  # fmt: skip
    BackboneFeatureExtractor(backbone=vit, image_size=(16, 16), feature_dim=16).save_pretrained("backbone")
    for folder in ("bank", "second", "backbone"):
        assert b"_name_or_path" not in b"".join(file.read_bytes() for file in Path(folder).rglob("*.json"))
        assert held({str(file): file for file in Path(folder).rglob("*.*") if file.is_file()}, home) == []


HUB_DATA = [
    ({"name": "digits"}, {}, "sklearn-docs/digits"),  # an old record, of a name that only this package gives
    ({"name": "mnist", "hub_id": None}, {}, None),  # a local folder of that name
    ({"name": "data/classes"}, {}, None),
    ({"name": "someone/faces", "hub_id": "someone/faces"}, {}, "someone/faces"),
    ({}, {"dataset": "mnist"}, "ylecun/mnist"),
    ({}, {"dataset": "mnist", "dataset_hub_id": None}, None),
    ({}, {"dataset": "data/classes"}, None),
    ({}, {"dataset": "faces", "dataset_hub_id": "someone/faces"}, "someone/faces"),
    ({}, {}, None),
]


@pytest.mark.parametrize(("data", "results", "expected"), HUB_DATA)
def test_a_data_set_is_named_where_it_came_from_the_hub(
    data: dict[str, Any], results: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    make_guided().save_pretrained(tmp_path / "run")
    if data:
        config = {"output_dir": "x", "train_batch_size": 1, "learning_rate": 1, "lr_scheduler": "cosine", "seed": 0}
        record = {"script": "train/train_ot.py", "config": config, "data": data}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        (tmp_path / "run" / "results.json").write_text("{}")
    rest = {"num_samples": 4, "extractor": {"name": "n", "feature_dim": 1}, "arms": {"run": {"metrics": {}}}}
    (tmp_path / "r.json").write_text(json.dumps(rest | results))
    file = tmp_path / "r.json" if results else None
    export_run(tmp_path / "run", tmp_path / "card", results=file, num_images=0)
    assert ModelCard.load(tmp_path / "card" / "README.md").data.datasets == ([expected] if expected else None)
    assert "data/classes" not in (tmp_path / "card" / "README.md").read_text()


def test_a_bank_tells_its_data_by_the_images(tmp_path: Path) -> None:
    pipeline = make_guided()
    for dataset, fingerprint, expected in (
        ("anything", load_images("digits").fingerprint, [HUB_IDS["digits"]]),
        ("digits", "another", None),
    ):
        pipeline.reference_bank.register_to_config(dataset=dataset, data_fingerprint=fingerprint)
        pipeline.save_pretrained(tmp_path / dataset)
        export_run(tmp_path / dataset, tmp_path / f"card of {dataset}", num_images=0)
        assert ModelCard.load(tmp_path / f"card of {dataset}" / "README.md").data.datasets == expected


def test_fingerprints_are_those_of_the_data_sets(real_datasets: Path) -> None:
    assert {HUB_IDS[name]: load_images(name).fingerprint for name in HUB_IDS} == {
        hub_id: facts.fingerprint for hub_id, facts in DATA.items()
    }


def test_a_hyperparameter_of_a_tracker_is_no_place(home: Path, tmp_path: Path) -> None:
    """The events of tensorboard hold the configuration as well."""
    write_pictures(home / "scans")
    train("features", home / "f", dataset=str(home / "scans"), resume_from_checkpoint="latest", **SHORT)
    logs = {str(file): file for file in (home / "f" / "logs").rglob("*") if file.is_file()}
    assert len(logs) >= 3 and held({name.replace(str(home), ""): file for name, file in logs.items()}, home) == []
    events = [file.read_bytes() for name, file in logs.items() if "tfevents" in name]
    assert any(b"output_dir" in content for content in events)
