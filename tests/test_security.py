"""Nothing that is loaded runs code, and no name in a file leads out of its folder."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
from pathlib import Path

import pytest
from makers import ROOT
from makers.models import make_guided, save_pipeline

from ot_diffusers import OTGuidedDDIMPipeline
from ot_diffusers.errors import InputError
from ot_diffusers.sampling import load_pipeline
from ot_diffusers.training.files import CHECKSUMS, damage, write_checksums

SOURCES = [file for folder in ("ot_diffusers", "train", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


def calls(file: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """Dotted name and keyword arguments of every call in a file."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), {word.arg or "**": word.value for word in node.keywords}) for node in nodes]


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_unpickles_or_executes(file: Path) -> None:
    for name, words in calls(file):
        assert not name.startswith(("pickle.", "marshal.", "dill.", "joblib.")), name
        assert name not in ("eval", "exec", "compile", "yaml.load", "torch.jit.load"), name
        assert name != "torch.load" or is_true(words.get("weights_only")), name
        assert not name.startswith(("np.load", "numpy.load")) or not is_true(words.get("allow_pickle")), name
        assert not is_true(words.get("trust_remote_code")), name
        reads_json = "Scheduler" in name or "Processor" in name
        passes_on = name.startswith("super()")  # `use_safetensors=True` unless the caller asks for something else
        if name.endswith(".from_pretrained") and not reads_json and not passes_on:
            assert is_true(words.get("use_safetensors")), name


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("component", "kind"),
    [
        ("unet", ["payload", "Payload"]),
        ("unet", ["diffusers", "../payload"]),
        ("unet", ["os", "system"]),
        ("scheduler", ["payload", "Payload"]),
        ("../payload", ["payload", "Payload"]),
    ],
)
def test_an_index_cannot_name_code(component: str, kind: list[str], pipeline: Path) -> None:
    """Neither in the component's folder nor beside the pipeline."""
    bomb = f"open({str(pipeline.parent / 'executed')!r}, 'w')\nclass Payload: pass\n"
    for folder in (pipeline / "unet", pipeline / "scheduler", pipeline, pipeline.parent):
        (folder / "payload.py").write_text(bomb)
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {component: kind}))
    if component in index:
        with pytest.raises(InputError, match="`pipeline` must be"):
            load_pipeline(pipeline)
    else:
        load_pipeline(pipeline)  # what is no part of the pipeline is not looked for
    assert not (pipeline.parent / "executed").exists()


HOSTILE = [
    ["payload", "Payload"],
    ["pipeline", "Payload"],
    ["../payload", "Payload"],
    "Payload",
    "../payload",
    [],
    3,
    None,
]


@pytest.mark.parametrize("name", HOSTILE, ids=str)
@pytest.mark.parametrize("key", ["_class_name", "custom_pipeline"])
def test_an_index_cannot_name_the_code_of_a_pipeline(key: str, name: object, tmp_path: Path) -> None:
    """The class that is called decides; a repository's own code runs for those only who ask for it."""
    make_guided().save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {key: name}))
    bomb = f"open({str(tmp_path / 'executed')!r}, 'w')\nfrom diffusers import DDIMPipeline as Payload\n"
    for file in ("model/payload.py", "model/pipeline.py", "model/unet/payload.py", "payload.py"):
        (tmp_path / file).write_text(bomb)
    with contextlib.suppress(ValueError, IndexError):
        assert type(OTGuidedDDIMPipeline.from_pretrained(tmp_path / "model")) is OTGuidedDDIMPipeline
    if key == "_class_name":
        with pytest.raises(InputError, match="`pipeline` must be"):
            load_pipeline(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def test_checksums_name_files_of_their_folder_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.bin"
    inside.mkdir()
    outside.write_bytes(b"secret")
    (inside / "a.bin").write_bytes(b"weights")
    write_checksums(inside)
    line = (inside / CHECKSUMS).read_text()
    shutil.copy(outside, inside / "b.bin")
    write_checksums(inside)
    (inside / "b.bin").unlink()
    stolen = (inside / CHECKSUMS).read_text().replace("b.bin", "../outside.bin")
    (inside / CHECKSUMS).write_text(stolen)
    assert damage(inside) == "../outside.bin is missing"
    (inside / CHECKSUMS).write_text(line)
    assert damage(inside) is None
