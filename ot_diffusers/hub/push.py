"""A finished run as a model repository: writes it into a folder, and pushes it to the Hub in one commit."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..data import HUB_IDS
from ..errors import InputError, require
from ..files import check_folder, local_or_hub, user_path
from ..outgoing import outgoing_files
from ..pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from ..sampling import load_pipeline, network_calls, sample_images, save_grid
from ..schedules import prediction_type_of
from .cards import DATA, KINDS, MARK, CardFacts, Picture, Records, render_card, render_part_card

CARD = "README.md"
PICTURE, PLAIN_PICTURE = "samples.png", "samples_plain.png"
NUM_IMAGES = 36
IMAGES_OF_CLASS, SHOWN_CLASSES = 16, 10
"""In a picture with a row for each class: as many images as guidance compares at least, of the first classes."""
TRAINING = "training"
RECORDS = ("run.json", "results.json", "metrics.jsonl")
PICTURES_AND_LOGS = ("samples/update-*.png", "logs/**/events.out.tfevents.*", "logs/**/hparams.yml")
"""Pictures and logs that a training script writes."""

Files = Mapping[str, Path | bytes]
"""Path in the repository to content."""

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16}


# --- A repository in a folder -----------------------------------------------------------------------------------------


def export_run(
    run: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    features: str | Path | None = None,
    denoiser: str | Path | None = None,
    results: str | Path | None = None,
    arm: str | None = None,
    beside: Sequence[str] = (),
    hardware: str | None = None,
    truncation_timestep: int | None = None,
    dtype: str = "float32",
    num_images: int | None = None,
    num_inference_steps: int | None = None,
) -> Path:
    """Write what goes to the Hub: weights, card, samples, evaluation, training configuration and logs.

    Args:
        run: folder of a `train_*.py` run, any saved pipeline that `load_pipeline` reads, or a folder that this function
            wrote, whose training records are then copied.
        output: a new or empty folder.
        repo_id: `user/name` for the card's snippet; the default is the folder's name.
        features: folder of a `train_features.py` run, which adds OT guidance.
        denoiser: run that trained the denoiser of a truncated chain, if it is not where `run` recorded it.
        results: `results.json` of an evaluation, comparison, demo or study, for the card.
        arm: the method in `results` that is this pipeline; needed where there are several.
        beside: methods in `results` that the card shows beside it; the first one by default.
        hardware: what the times in `results` and in the training records were measured on, for the card.
        truncation_timestep: T' of a `TruncatedPriorPipeline`, where it is not that of the run.
        dtype: `"float32"`, or `"float16"` for half the size; such weights load as float32 by default.
        num_images: images in `samples.png`, sampled as one batch, 36 by default; of a pipeline with classes, 16 of each
            of the first ten by default, with a row for each class. 0 writes no picture.
        num_inference_steps: denoising steps of the picture and the snippet; the pipeline's default otherwise.

    Returns:
        The folder.

    Raises:
        InputError: bad input; nothing is written then.
    """
    output, run = check_folder(output), Path(local_or_hub(run, "run"))
    if repo_id is not None:
        check_repo_id(repo_id)
    require(not output.exists() or _is_empty(output), "output", "be a new or empty folder", str(output))
    outside = run.resolve() not in output.resolve().parents
    require(outside, "output", "lie outside the run, which is copied", str(output))
    features = None if features is None else user_path(features)
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)
    require(num_images is None or num_images >= 0, "num_images", "be at least 0", num_images)
    evaluation = read_results(results) if results is not None else None
    arm = choose_arm(evaluation, arm) if evaluation else None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}")
    except OSError as error:
        raise InputError(f"`output` must be a place to write to, got {str(output)!r} ({error.strerror})") from error
    with scratch as name:
        folder = Path(name)
        pipeline = load_pipeline(run, features)
        behind = _runs_behind(run, features=features, denoiser=denoiser)
        if truncation_timestep is not None:
            pipeline = _restarted(pipeline, behind.get("denoiser"), truncation_timestep)
        _cast(pipeline, DTYPES[dtype])
        runs = _copy_training(run, behind, folder)
        picture = None if num_images == 0 else _write_pictures(pipeline, folder, num_images, num_inference_steps)
        write_repository(
            pipeline,
            folder,
            repo_id or output.resolve().name,
            runs=runs,
            results=evaluation,
            arm=arm,
            beside=beside,
            hardware=hardware,
            picture=picture,
            num_inference_steps=num_inference_steps,
        )
        _move(outgoing_files(folder, run), output)
    return output


def _restarted(pipeline: Any, denoiser: Path | None, truncation_timestep: int) -> TruncatedPriorPipeline:
    """The pipeline from another T', by the schedule of its denoiser's run where that is a saved pipeline.

    Raises:
        InputError: a pipeline without T', or a T' out of range.
    """
    truncated = isinstance(pipeline, TruncatedPriorPipeline)
    requirement = "be left out unless the run is a TruncatedPriorPipeline"
    require(truncated, "truncation_timestep", requirement, truncation_timestep)
    saved = denoiser is not None and (denoiser / "model_index.json").is_file()
    full_scheduler = load_pipeline(str(denoiser)).scheduler if saved else None
    return pipeline.at_truncation_timestep(truncation_timestep, full_scheduler)


def _write_pictures(pipeline: Any, folder: Path, num_images: int | None, num_inference_steps: int | None) -> Picture:
    """Write a grid of samples in float32, with a row for each class, and of a guided pipeline the one without guidance
    from the same noise."""
    stored = pipeline.unet.dtype
    _cast(pipeline, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    columns, names = None, list(pipeline.labels)[:SHOWN_CLASSES] if getattr(pipeline, "takes_labels", False) else []
    if names:
        columns = IMAGES_OF_CLASS if num_images is None else math.ceil(num_images / len(names))
        num_images = columns * len(names)
        call["class_labels"] = [label for label in range(len(names)) for _ in range(columns)]
    num_images = num_images or NUM_IMAGES
    images = sample_images(pipeline, num_images, **call)
    save_grid(images, folder / PICTURE, columns)
    guided = getattr(pipeline, "reference_bank", None) is not None
    if guided:
        save_grid(sample_images(pipeline, num_images, guidance_scale=0, **call), folder / PLAIN_PICTURE, columns)
    _cast(pipeline, stored)
    height, width = images.shape[2:]
    plain_file = PLAIN_PICTURE if guided else None
    return Picture(PICTURE, plain_file, (height, width), num_images, network_calls(pipeline), names)


def _move(files: Files, output: Path) -> None:
    """Write files into a folder; files on the disk are moved there."""
    for name, content in files.items():
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.move(content, target)
        else:
            target.write_bytes(content)


def write_repository(
    pipeline: Any,
    output: Path,
    repo_id: str,
    *,
    variant: str | None = None,
    runs: Records = MappingProxyType({}),
    results: Mapping[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Write weights, evaluation and card of a pipeline into a folder; arguments and `facts` as in `CardFacts`."""
    name = type(pipeline).__name__
    require(name in KINDS, "pipeline", f"be one of {', '.join(KINDS)}", name)
    card = render_card(
        CardFacts(
            repo_id=repo_id,
            class_name=name,
            parameters=parameters(pipeline),
            dataset=_hub_data_set(runs, results, getattr(pipeline, "reference_bank", None)),
            config=scheduler_facts(pipeline),
            runs=runs,
            results=results,
            weights_dtype=str(pipeline.unet.dtype).removeprefix("torch."),
            **facts,
        )
    )
    pipeline.save_pretrained(output, variant=variant)
    if results is not None:
        (output / "results.json").write_text(_json(results), encoding="utf-8")
    card.save(output / CARD)


def read_results(file: str | Path) -> dict[str, Any]:
    """The contents of an evaluation's `results.json`.

    Raises:
        InputError: no such file, or one without arms.
    """
    file = user_path(file)
    require(file.is_file(), "results", "be an existing file", str(file))
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"`results` must be JSON, got {str(file)!r} ({error})") from error
    complete = isinstance(results, dict) and bool(results.get("arms")) and "extractor" in results
    require(complete, "results", "be the results.json of an evaluation, with arms", str(file))
    return results


def choose_arm(results: Mapping[str, Any], arm: str | None) -> str:
    """The named method of the results, or the only one.

    Raises:
        InputError: no such method, or several and no name.
    """
    arms = list(results["arms"])
    arm = arms[0] if arm is None and len(arms) == 1 else arm
    require(arm in arms, "arm", f"be one of {', '.join(arms)}", arm)
    return str(arm)


def _cast(pipeline: Any, dtype: torch.dtype) -> None:
    """Cast every part; the method `to` of diffusers would warn about float16 on a CPU."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=dtype)


def parameters(pipeline: Any) -> dict[str, int]:
    """Number of parameters of each part that is a network."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def scheduler_facts(pipeline: Any) -> dict[str, Any]:
    """What a card says about a pipeline's scheduler."""
    config = pipeline.scheduler.config
    facts = {
        "scheduler": type(pipeline.scheduler).__name__,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": prediction_type_of(pipeline.scheduler),
        "noise_coupling": config.get("_noise_coupling"),
        "tuned_steps": config.get("_num_inference_steps"),
    }
    if isinstance(pipeline, TruncatedPriorPipeline):
        facts["truncation_timestep"] = pipeline.truncation_timestep
    if getattr(pipeline, "takes_labels", False):
        facts["class_names"] = list(pipeline.labels)
        facts["guides_by_class"] = pipeline.reference_bank is not None and pipeline.reference_bank.labels is not None
    return facts


def _copy_training(run: Path, behind: Mapping[str, Path], output: Path) -> Records:
    """Copy the records of the run and of those that it builds on."""
    records = {}
    for name, folder in behind.items():
        target = _records_folder(output, name)
        target.mkdir(parents=True)
        for file in (file for file in RECORDS if (folder / file).is_file()):
            shutil.copyfile(folder / file, target / file)
        records[name] = _read_json(target / "run.json"), _read_json(target / "results.json")
    for recorded in _pictures_and_logs(run):
        target = output / recorded.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recorded, target)
    return records


def _pictures_and_logs(run: Path) -> Iterator[Path]:
    """The pictures and logs that training wrote into the run's folder, and no other files."""
    for file in sorted(path for pattern in PICTURES_AND_LOGS for path in run.glob(pattern)):
        if file.is_symlink() or not file.is_file():
            logger.warning("%s is left out: it is not a file of the run", file.relative_to(run))
        else:
            yield file


def _runs_behind(run: Path, *, features: str | Path | None, denoiser: str | Path | None) -> dict[str, Path]:
    """Folders with the records of the run itself, its denoiser and its feature network, as far as they are on this
    machine and complete; of a folder that `export_run` wrote, those that it copied. Given folders come first."""
    if _is_run(run):
        config = _read_json(run / "run.json")["config"]
        recorded = {"pipeline": run, "denoiser": config.get("denoiser")}
        recorded["feature network"] = config.get("feature_extractor")
    else:
        recorded = {name: _records_folder(run, name) for name in ("pipeline", "denoiser", "feature network")}
    given = {"feature network": features, "denoiser": denoiser}
    folders = recorded | {name: folder for name, folder in given.items() if folder is not None}
    return {name: Path(folder) for name, folder in folders.items() if folder and _is_run(Path(folder))}


def _records_folder(repository: Path, name: str) -> Path:
    return repository / TRAINING / name.replace(" ", "_")


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "results.json").is_file()


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _hub_data_set(runs: Records, results: Mapping[str, Any] | None, bank: Any) -> str | None:
    """Hub id of the training data, if it came from the Hub: from the records, or from the reference bank's fingerprint.

    Records without a Hub id name such a data set as this package does.
    """
    data = [run.get("data", {}) for run, _ in runs.values()]
    candidates = [(entry.get("name"), entry, "hub_id") for entry in data]
    candidates.append(((results or {}).get("dataset"), results or {}, "dataset_hub_id"))
    for name, record, key in candidates:
        if name:
            return record.get(key, HUB_IDS.get(name))
    fingerprint = bank.config.data_fingerprint if bank is not None else None
    return next((hub_id for hub_id, facts in DATA.items() if facts.fingerprint == fingerprint), None)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def push_pipeline(
    pipeline: Any,
    repo_id: str,
    *,
    variant: str | None = None,
    results: str | Path | None = None,
    arm: str | None = None,
    **options: Any,
) -> str:
    """Push a pipeline that is in memory, with a card from `results`; `options` are those of `push_folder`."""
    check_repo_id(repo_id)
    evaluation = read_results(results) if results is not None else None
    arm = choose_arm(evaluation, arm) if evaluation else None
    with tempfile.TemporaryDirectory() as folder:
        write_repository(pipeline, Path(folder), repo_id, variant=variant, results=evaluation, arm=arm)
        message = options.pop("commit_message", None) or f"Upload {type(pipeline).__name__}"
        return push_folder(folder, repo_id, commit_message=message, **options)


def push_part(
    part: Any,
    repo_id: str,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Push one part of a pipeline, with a short card unless it goes into a subfolder; `options` are those of
    `push_files`."""
    check_repo_id(repo_id)
    name = type(part).__name__
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder, variant=variant)
        if not subfolder:
            render_part_card(repo_id, name).save(Path(folder) / CARD)
        files = {f"{subfolder}/{path}" if subfolder else path: file for path, file in outgoing_files(folder).items()}
        return push_files(files, repo_id, commit_message=commit_message or f"Upload {name}", **options)


# --- The Hub ----------------------------------------------------------------------------------------------------------


def repository_files(folder: str | Path) -> dict[str, int]:
    """Path in the repository to size in bytes of each file in a folder that a push sends; see `outgoing_files`."""
    return file_sizes(outgoing_files(user_path(folder)))


def file_sizes(files: Files) -> dict[str, int]:
    """Path in the repository to size in bytes."""
    return {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size for path, content in files.items()
    }


def push_folder(folder: str | Path, repo_id: str, *, commit_message: str | None = None, **options: Any) -> str:
    """Push a folder as one commit: what `export_run` wrote, or any saved pipeline.

    `outgoing_files` selects the files; `options` are those of `push_files`.

    Raises:
        InputError: as `outgoing_files` and `push_files`, or a folder without a pipeline.
    """
    check_repo_id(repo_id)
    folder = user_path(folder)
    files = outgoing_files(folder)
    require("model_index.json" in files, "folder", "hold a saved pipeline", str(folder))
    message = commit_message or f"Upload {folder.resolve().name}"
    return push_files(files, repo_id, commit_message=message, **options)


def push_files(
    files: Files,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push files as one commit. Files that an interrupted push already sent are not sent again.

    A card in the repository that this package did not write is kept.

    Args:
        files: as `outgoing_files` returns them.
        repo_id: `user/name`, or a name alone for a repository of the token's owner; it is created if it does not
            exist.
        commit_message: first line of the commit's message.
        private: create it private. An existing public repository is refused.
        token: access token; by default the one that `hf auth login` stored or `HF_TOKEN` holds.
        revision: branch to commit to; it is created if it does not exist.
        create_pr: open a pull request instead of a commit.

    Returns:
        Address of the commit.

    Raises:
        InputError: no token, no permission, no network or no such name; no file is committed then.
    """
    check_repo_id(repo_id)
    api = HfApi(token=find_token(token))
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"`repo` {repo_id!r} cannot be reached: HF_HUB_OFFLINE is set")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:
            public = api.repo_info(repo_id).private is False
            require(not public, "private", f"be left out for {repo_id}, which is public", private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = {CARD} if _has_card_of_its_own(api, repo_id, revision) else set()
        operations = [
            CommitOperationAdd(path, _addressed(content, repo_id) if path == CARD else content)
            for path, content in files.items()
            if path not in kept
        ]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except InputError:
        raise
    except HfHubHTTPError as error:
        raise InputError(f"`repo` {repo_id!r} refused the push: {_reason(error)}") from error
    except ValueError as error:  # a card's metadata
        raise InputError(f"`repo` {repo_id!r} refused the push: {_first_line(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(f"`repo` {repo_id!r} cannot be reached: {_first_line(error)}") from error
    return str(commit.pr_url or commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub does not accept for a repository.

    Raises:
        InputError: such a name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"`repo` must be user/name, got {repo_id!r} ({_first_line(error)})") from error


def find_token(token: str | None = None) -> str:
    """The token to push with: the given one, or the one that `hf auth login` stored or `HF_TOKEN` holds.

    Raises:
        InputError: there is no token, or it has characters that a request cannot carry.
    """
    token = token or get_token()
    require(token is not None, "token", "be given to push: run `hf auth login`, or set HF_TOKEN", None)
    sendable = token is not None and token.isascii() and token.isprintable()
    require(sendable, "token", "have ASCII letters and digits only", "one with others")
    return str(token)


def _addressed(card: Path | bytes, repo_id: str) -> bytes:
    """A card of this package with the repository's id in its snippet; any other card unchanged."""
    content = card.read_bytes() if isinstance(card, Path) else card
    if MARK.encode() not in content:
        return content
    return re.sub(rb'(\.from_pretrained\()"[^"]+"', rb'\1"' + repo_id.encode() + b'"', content)


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a card that this package did not write.

    Raises:
        HfHubHTTPError, OSError: the Hub gave no answer.
    """
    with tempfile.TemporaryDirectory() as fresh:  # an earlier call may have cached an older card
        try:
            file = api.hf_hub_download(repo_id, CARD, revision=revision, cache_dir=fresh)
        except LocalEntryNotFoundError as error:  # the Hub did not answer
            raise ConnectionError(str(error)) from error
        except EntryNotFoundError:
            return False
        return MARK.encode() not in Path(file).read_bytes()


def _reason(error: HfHubHTTPError) -> str:
    """The message of the Hub, or the meaning of its status, in one line."""
    status = error.response.status_code if error.response is not None else None
    meaning = {401: "the token is not valid", 403: "the token has no permission to write there"}.get(status or 0)
    return meaning or error.server_message or _first_line(error)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
