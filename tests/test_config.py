"""Configurations: every preset loads, values are coerced by the type of their field, and what is wrong is one line."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from makers import ROOT

from ot_diffusers.config import (
    GROUPS,
    BaselineConfig,
    FeaturesConfig,
    FewStepConfig,
    OTConfig,
    PriorConfig,
    Range,
    TrainingConfig,
    describe,
    load_config,
    make_config,
    option,
    options_by_group,
)
from ot_diffusers.errors import InputError
from ot_diffusers.launch import run_script

CONFIGS = ROOT / "configs"
CLASSES: dict[str, type[TrainingConfig]] = {
    "features": FeaturesConfig,
    "evaluator": FeaturesConfig,
    "baseline": BaselineConfig,
    "ot": OTConfig,
    "few_step": FewStepConfig,
}
CONFIG_CLASSES = [TrainingConfig, FeaturesConfig, BaselineConfig, OTConfig, PriorConfig, FewStepConfig]
PRESETS = sorted(
    file
    for file in CONFIGS.glob("*/*.yaml")
    if file.parent.name != "accelerate" and file.stem.startswith(tuple(CLASSES))
)


def config_class_of(preset: Path) -> type[TrainingConfig]:
    return next(kind for name, kind in CLASSES.items() if preset.stem.startswith(name))


def default_of(config_class: type, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config_class) if field.name == name)


# --- Presets ----------------------------------------------------------------------------------------------------------


def test_every_data_set_has_the_whole_chain() -> None:
    names = {str(preset.relative_to(CONFIGS)) for preset in PRESETS}
    for data in ("digits", "mnist"):
        assert {f"{data}/{script}.yaml" for script in CLASSES} <= names


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_preset_loads(preset: Path) -> None:
    config = load_config(config_class_of(preset), ["--config", str(preset)])
    assert config.dataset == preset.parent.name
    for key, value in yaml.safe_load(preset.read_text()).items():
        read = getattr(config, key)
        if isinstance(value, list):
            assert read == tuple(value)
        else:
            # 2e-4 is text to YAML 1.1 and a number to the configuration.
            assert str(read) == str(value) or float(read) == float(value), key


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_presets_that_are_compared_differ_in_the_method_only(data: str) -> None:
    """The baseline and the OT models of a data set share every option that both scripts have, but for the folder and
    what is the method: the coupling and its straight paths, or the term of the loss."""
    baseline = load_config(BaselineConfig, ["--config", str(CONFIGS / data / "baseline.yaml")])
    for preset in sorted((CONFIGS / data).glob("ot*.yaml")):
        ot = load_config(OTConfig, ["--config", str(preset)])
        method = {"prediction_type", "noise_coupling", "timestep_spacing"} if preset.name == "ot.yaml" else set()
        names = {field.name for field in dataclasses.fields(BaselineConfig)} - {"output_dir", "coupling_tolerance"}
        differing = {name for name in names if getattr(ot, name) != getattr(baseline, name)}
        assert differing == method, preset.name


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
def test_evaluator_is_independent_of_the_feature_network(data: str) -> None:
    features, evaluator = (
        load_config(FeaturesConfig, ["--config", str(CONFIGS / data / f"{name}.yaml")])
        for name in ("features", "evaluator")
    )
    assert features.architecture != evaluator.architecture
    assert features.seed != evaluator.seed
    assert features.output_dir != evaluator.output_dir


def test_presets_of_the_digits_say_only_what_matters() -> None:
    """A key differs from its default, or belongs to what a reader looks for: the data, the weight, the clipping."""
    stated_anyway = {"dataset", "ot_weight", "max_grad_norm"}
    for preset in (file for file in PRESETS if file.parent.name == "digits"):
        kind = config_class_of(preset)
        config = load_config(kind, ["--config", str(preset)])
        for key in yaml.safe_load(preset.read_text()):
            assert key in stated_anyway or getattr(config, key) != default_of(kind, key), (preset.name, key)


def test_runs_of_presets_never_share_a_folder() -> None:
    folders = [load_config(config_class_of(preset), ["--config", str(preset)]).output_dir for preset in PRESETS]
    assert len(set(folders)) == len(folders)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),  # text to YAML 1.1
        ("learning_rate", "1", 1.0),
        ("ot_weight", "0", 0.0),
        ("max_train_steps", "50", 50),
        ("max_train_steps", "50.0", 50),
        ("max_train_steps", "none", None),
        ("max_train_steps", "", None),
        ("max_train_seconds", "null", None),
        ("block_out_channels", "[32, 64]", (32, 64)),
        ("block_out_channels", "32,64", (32, 64)),
        ("block_out_channels", "32", (32,)),
        ("attention_levels", "[]", ()),
        ("attention_levels", "", ()),
        ("snr_weighting", "false", False),
        ("normalize_features", "yes", True),
        ("mixed_precision", "no", "no"),  # a truth value to YAML 1.1
        ("resume_from_checkpoint", "none", None),
        ("output_dir", "2026-01-02", "2026-01-02"),  # a date to YAML
        ("output_dir", "007", "007"),  # an octal number to YAML
        ("dataset", "@user/name", "@user/name"),  # no YAML at all
        ("dataset", "a=b", "a=b"),
        ("report_to", "none", "none"),
    ],
)
def test_text_becomes_the_type_of_the_field(key: str, text: str, value: Any) -> None:
    read = getattr(load_config(OTConfig, [f"{key}={text}"]), key)
    assert read == value
    assert type(read) is type(value)


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("blur: 0.5\not_weight: 1e-2\n")
    for arguments in (["blur=0.7", "--config", str(file)], [f"--config={file}", "--blur=0.7"]):
        config = load_config(OTConfig, arguments)
        assert (config.blur, config.ot_weight, config.scaling) == (0.7, 0.01, default_of(OTConfig, "scaling"))


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load_config(BaselineConfig, ["--config", str(file)]) == BaselineConfig()


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_help_lists_every_option_with_its_default_and_what_it_may_be(config_class: type) -> None:
    shown = describe(config_class)
    groups = options_by_group(config_class)
    assert re.findall(r"^(\S.*):$", shown, re.MULTILINE) == list(groups)
    entries = [" ".join(entry.split()) for entry in re.findall(r"^  \w+=.*(?:\n {36}.+)*", shown, re.MULTILINE)]
    fields = [field for fields in groups.values() for field in fields]
    assert [entry.split("=")[0] for entry in entries] == [field.name for field in fields]
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(line[36] != " " and line[35] == " " for line in shown.splitlines() if len(line) > 36)
    for entry, field in zip(entries, fields, strict=True):
        allowed = field.metadata["range"]
        text = f"{field.metadata['help']} {allowed}" if allowed else field.metadata["help"]
        assert entry.endswith(f" {text}") or entry.endswith(f"={text}")
        # What help shows can be given back.
        default = entry.removesuffix(text).split("=", 1)[1].strip()
        assert getattr(load_config(config_class, [f"{field.name}={default}"]), field.name) == field.default


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_every_option_is_in_one_of_the_groups(config_class: type) -> None:
    groups = options_by_group(config_class)
    assert list(groups) == [group for group in GROUPS if group in groups]
    names = [field.name for fields in groups.values() for field in fields]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(config_class))


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_an_option_with_another_default_keeps_its_range_and_group(config_class: type) -> None:
    own = {field.name: field.metadata for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(TrainingConfig):
        for name in ("range", "group"):
            assert own[field.name][name] == field.metadata[name], field.name


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "shown", "requirement"),
    [
        ({"minimum": 0}, (0, 2.5), (-1, math.nan, (1, -1)), "(≥ 0)", "be at least 0"),
        ({"above": 0}, (0.1, math.inf, (), (1, 2)), (0, math.nan, (1, 0)), "(> 0)", "be positive"),
        ({"minimum": 0, "below": 1}, (0, 0.9), (-0.1, 1, math.nan), "[0, 1)", "lie in [0, 1)"),
        ({"above": 0, "below": 1}, (0.1, 0.9), (0, 1, math.nan), "(0, 1)", "lie strictly between 0 and 1"),
        ({"choices": ("a", "b")}, ("a", ("a", "b")), ("c", ("a", "c"), None), "{a, b}", "be a or b"),
        ({"choices": tuple("abcd")}, ("d",), ("e",), "{a, b, c, d}", "be one of a, b, c, d"),
        ({"minimum": 1, "must": "hold a point"}, (1,), (0,), "(≥ 1)", "hold a point"),
    ],
)
def test_range(bounds: dict[str, Any], inside: Any, outside: Any, shown: str, requirement: str) -> None:
    found = Range(**bounds)
    assert all(map(found.holds, inside)) and not any(map(found.holds, outside))
    assert (str(found), found.requirement(optional=False)) == (shown, requirement)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("blurr=1", "unknown configuration key 'blurr'; did you mean 'blur'?"),
        ("xyzzy=1", "unknown configuration key 'xyzzy'; known keys: "),
        ("ot_weight", "arguments are `--config FILE` and `key=value`, got 'ot_weight'"),
        ("--config", "`--config` must be followed by a YAML file, got None"),
        ("--config=absent.yaml", "`--config` must be an existing YAML file, got 'absent.yaml'"),
        ("blur=-1", "`blur` must be a positive length, got -1.0"),
        ("blur=0", "`blur` must be a positive length, got 0.0"),
        ("blur=wide", "`blur` must be a number, got 'wide'"),
        ("blur=true", "`blur` must be a number, got True"),
        ("blur=nan", "`blur` must be finite, got 'nan'"),
        ("blur=.inf", "`blur` must be finite, got inf"),
        ("blur=[", "`blur` must be a number, got '['"),
        ("blur=", "`blur` must be a number, got None"),
        ("scaling=1", "`scaling` must lie strictly between 0 and 1, got 1.0"),
        ("num_reference_samples=1", "`num_reference_samples` must be at least 2 (a distribution, not a point), got 1"),
        ("ot_weight=-0.1", "`ot_weight` must be at least 0, got -0.1"),
        ("squash=sigmoid", "`squash` must be clamp or tanh, got 'sigmoid'"),
        ("ot_backend=pot", "`ot_backend` must be one of native, geomloss, flash-sinkhorn, got 'pot'"),
        (
            "noise_coupling=hungarian",
            "`noise_coupling` must be independent, assignment or semidiscrete, got 'hungarian'",
        ),
        ("ot_iterations=0", "`ot_iterations` must be at least 1 or none, got 0"),
        ("snr_weighting=1", "`snr_weighting` must be true or false, got 1"),
        ("train_batch_size=0", "`train_batch_size` must be at least 1, got 0"),
        ("train_batch_size=1.5", "`train_batch_size` must be a whole number, got 1.5"),
        ("train_batch_size=.inf", "`train_batch_size` must be a whole number, got inf"),
        ("train_batch_size={}", "`train_batch_size` must be a whole number, got {}"),
        ("train_batch_size=none", "`train_batch_size` must be a whole number, got 'none'"),
        ("max_train_steps=0", "`max_train_steps` must be at least 1 or none, got 0"),
        ("max_train_seconds=0", "`max_train_seconds` must be positive or none, got 0.0"),
        ("learning_rate=0", "`learning_rate` must be positive, got 0.0"),
        ("lr_scheduler=cosin", "`lr_scheduler` must be one of constant, "),
        ("adam_beta1=1", "`adam_beta1` must lie in [0, 1), got 1.0"),
        ("seed=-1", "`seed` must not be negative, got -1"),
        ("mixed_precision=fp8", "`mixed_precision` must be no, fp16 or bf16, got 'fp8'"),
        ("channels=2", "`channels` must be 1, 3 or none, got 2"),
        ("block_out_channels=[32, x]", "`block_out_channels` must be a whole number, got 'x'"),
        ("block_out_channels=[40]", "`block_out_channels` must be multiples of norm_num_groups (32), got (40,)"),
        ("block_out_channels=[]", "`block_out_channels` must be multiples of norm_num_groups (32), got ()"),
        ("norm_num_groups=0", "`norm_num_groups` must be at least 1, got 0"),
        ("prediction_type=noise", "`prediction_type` must be one of epsilon, v_prediction, "),
        ("timestep_sampler=cubic", "`timestep_sampler` must be one of uniform, quadratic, "),
        ("beta_schedule=cosine", "`beta_schedule` must be one of linear, "),
        ("max_timestep=0", "`max_timestep` must be at least 1 or none, got 0"),
        ("max_timestep=1001", "`max_timestep` must lie in 1 … 1000, got 1001"),
        ("num_inference_steps=1001", "`num_inference_steps` must lie in 1 … 1000, got 1001"),
        ("sample_epochs=0", "`sample_epochs` must be at least 1, got 0"),
        ("num_validation_samples=0", "`num_validation_samples` must be at least 1, got 0"),
        ("dropout=1", "`dropout` must lie in [0, 1), got 1.0"),
        ("ema_decay=1", "`ema_decay` must lie in [0, 1), got 1.0"),
    ],
)
def test_what_is_wrong_is_one_line(argument: str, expected: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_config(OTConfig, [argument])
    assert str(refusal.value).startswith(expected)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"architecture": "vit"}, "`architecture` must be conv or residual, got 'vit'"),
        ({"block_out_channels": [8, 16, 32]}, "`block_out_channels` must hold two widths for conv, got (8, 16, 32)"),
        (
            {"architecture": "residual", "block_out_channels": [12]},
            "`block_out_channels` must be multiples of 8, got (12,)",
        ),
        ({"feature_dim": 0}, "`feature_dim` must be at least 1, got 0"),
        ({"optimizer": "adam"}, "`optimizer` must be adamw or sgd, got 'adam'"),
        ({"norm_type": "layer_norm"}, "`norm_type` must be group_norm or batch_norm, got 'layer_norm'"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must lie in [0, 1), got 1.0"),
        ({1: 2}, "unknown configuration key 1; known keys: "),
    ],
)
def test_feature_network_configurations_that_cannot_be(values: dict[Any, Any], expected: str) -> None:
    with pytest.raises(InputError) as refusal:
        make_config(FeaturesConfig, values)
    assert str(refusal.value).startswith(expected)


@pytest.mark.parametrize("content", ["- a\n- b\n", "blur: [1\nscaling: 2"])
def test_file_that_is_no_mapping(content: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"`--config` must .*bad\.yaml") as refusal:
        load_config(OTConfig, ["--config", str(file)])
    assert "\n" not in str(refusal.value)


def test_script_prints_the_line_and_leaves_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_ot.py", "blur=-1"])
    with pytest.raises(SystemExit) as leaving:
        run_script(lambda config: None, OTConfig, "")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: `blur` must be a positive length, got -1.0\n"


def test_script_help_needs_no_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_ot.py", "blur=-1", "--help"])
    run_script(lambda config: pytest.fail("must not run"), OTConfig, "accelerate launch train/train_ot.py")
    shown = capsys.readouterr().out
    assert shown.startswith("accelerate launch train/train_ot.py")
    assert describe(OTConfig) in shown


# --- Nested values ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    width: int = option(1, "a number")


@dataclasses.dataclass
class Whole:
    parts: dict[str, Part] = dataclasses.field(default_factory=dict, metadata={"help": "name to part"})
    call: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "anything"})


def test_parts_of_a_configuration_are_read_like_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text("parts:\n  first: {width: '3'}\ncall: {guidance_scale: 0, names: [a]}\n")
    read = load_config(Whole, ["--config", str(file)])
    assert read.parts == {"first": Part(3)} and read.call == {"guidance_scale": 0, "names": ["a"]}
    assert load_config(Whole, ["call={steps: 10}"]).call == {"steps": 10}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parts: 3", "`parts` must hold `name: value` lines, got 3"),
        ("parts: {first: 3}", "`parts.first` must hold `name: value` lines, got 3"),
        ("parts: {first: {wdith: 3}}", "did you mean 'width'?"),
        ("parts: {first: {width: wide}}", "`width` must be a whole number, got 'wide'"),
    ],
)
def test_what_is_wrong_in_a_part_is_one_line_too(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(Whole, ["--config", str(file)])
    assert expected in str(caught.value)
