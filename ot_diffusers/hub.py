"""A finished run as a model repository: written into a folder, and pushed to the Hub in one commit."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .cards import KINDS, MARK, CardFacts, Records, render_card
from .errors import InputError, require
from .files import check_folder, local_or_hub, user_path
from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
from .sampling import load_pipeline, sample_images, save_grid

PICTURE = "samples.png"
RECORDS = ("run.json", "results.json", "metrics.jsonl")
"""What a training script writes about a run."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}


# --- A repository in a folder -----------------------------------------------------------------------------------------


def export_run(
    run: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    features: str | Path | None = None,
    results: str | Path | None = None,
    arm: str | None = None,
    dtype: str = "float32",
    num_images: int = 64,
    num_inference_steps: int | None = None,
) -> Path:
    """Write what goes to the Hub: weights, card, samples, evaluation, training configuration and logs.

    Args:
        run: folder of a `train_*.py` run, or any saved pipeline that `load_pipeline` reads.
        output: a new or empty folder.
        repo_id: `user/name` for the card's snippet; the default is the folder's name.
        features: run of `train_features.py` that makes it an `OTGuidedDDIMPipeline`.
        results: `results.json` of an evaluation, comparison, demo or study, for the card.
        arm: the arm of `results` that is this pipeline; needed where there are several.
        dtype: `"float32"`, or `"float16"` for half the size; such weights load as float32 by default.
        num_images: pictures in `samples.png`; 0 for none.
        num_inference_steps: denoising steps of the pictures; the pipeline's default otherwise.

    Returns:
        The folder.

    Raises:
        InputError: bad input; nothing is written then.
    """
    output, run = check_folder(output), Path(local_or_hub(run, "run"))
    require(not output.exists() or _is_empty(output), "output", "be a new or empty folder", str(output))
    outside = run.resolve() not in output.resolve().parents
    require(outside, "output", "lie outside the run, which is copied", str(output))
    features = None if features is None else user_path(features)
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)
    require(num_images >= 0, "num_images", "be at least 0", num_images)
    evaluation = read_results(results) if results is not None else None
    arm = choose_arm(evaluation, arm) if evaluation else None
    pipeline = load_pipeline(run, features)
    _cast(pipeline, DTYPES[dtype])

    output.mkdir(parents=True, exist_ok=True)
    runs = _copy_training(run, Path(features) if features else None, output)
    picture = PICTURE if num_images else None
    name = repo_id or output.resolve().name
    write_repository(pipeline, output, name, runs=runs, results=evaluation, arm=arm, picture=picture)
    if num_images:
        _cast(pipeline, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        steps: dict[str, Any] = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        save_grid(sample_images(pipeline, num_images, **steps), output / PICTURE)
    return output


def write_repository(
    pipeline: Any,
    output: Path,
    repo_id: str,
    *,
    variant: str | None = None,
    runs: Records = MappingProxyType({}),
    results: Mapping[str, Any] | None = None,
    arm: str | None = None,
    picture: str | None = None,
) -> None:
    """Write weights, evaluation and card of a pipeline into a folder; arguments as in `CardFacts`."""
    name = type(pipeline).__name__
    require(name in KINDS, "pipeline", f"be one of {', '.join(KINDS)}", name)
    bank = getattr(pipeline, "reference_bank", None)
    facts = CardFacts(
        repo_id=repo_id,
        class_name=name,
        parameters=parameters(pipeline),
        dataset=_dataset(runs, results) or (bank.config.dataset if bank is not None else None),
        config=scheduler_facts(pipeline),
        runs=runs,
        results=results,
        arm=arm,
        picture=picture,
        weights_dtype=str(pipeline.unet.dtype).removeprefix("torch."),
    )
    card = render_card(facts)
    pipeline.save_pretrained(output, variant=variant)
    if results is not None:
        (output / "results.json").write_text(_json(results), encoding="utf-8")
    card.save(output / "README.md")


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
    """The named arm, or the only one.

    Raises:
        InputError: no such arm, or several and none named.
    """
    arms = list(results["arms"])
    arm = arms[0] if arm is None and len(arms) == 1 else arm
    require(arm in arms, "arm", f"be one of {', '.join(arms)}", arm)
    return str(arm)


def _cast(pipeline: Any, dtype: torch.dtype) -> None:
    """Every part in another precision; diffusers' own `to` warns of it."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=dtype)


def parameters(pipeline: Any) -> dict[str, int]:
    """Number of parameters of each part that has any."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def scheduler_facts(pipeline: Any) -> dict[str, Any]:
    """What a reader wants to know of a pipeline's scheduler."""
    config = pipeline.scheduler.config
    facts = {
        "scheduler": type(pipeline.scheduler).__name__,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
    }
    if isinstance(pipeline, TruncatedPriorPipeline):
        facts["truncation_timestep"] = pipeline.truncation_timestep
    return facts


def _copy_training(run: Path, features: Path | None, output: Path) -> Records:
    """Copy what the run and those it builds on recorded."""
    records = {}
    for name, folder in _runs_behind(run, features).items():
        target = output / "training" / name.replace(" ", "_")
        target.mkdir(parents=True)
        for file in (file for file in RECORDS if (folder / file).is_file()):
            shutil.copyfile(folder / file, target / file)
        (target / "run.json").write_text(_json(_without_paths(_read_json(folder / "run.json"))), encoding="utf-8")
        records[name] = _read_json(target / "run.json"), _read_json(target / "results.json")
    for name in ("samples", "logs"):
        if (run / name).is_dir():
            shutil.copytree(run / name, output / name)
    return records


def _runs_behind(run: Path, features: Path | None) -> dict[str, Path]:
    """The run itself, its denoiser and its feature network, where they lie on this machine and are complete."""
    complete = {"pipeline": run} if _is_run(run) else {}
    config = _read_json(run / "run.json")["config"] if complete else {}
    sources = {"denoiser": config.get("denoiser"), "feature network": features or config.get("feature_extractor")}
    return complete | {name: Path(path) for name, path in sources.items() if path and _is_run(Path(path))}


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "results.json").is_file()


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _without_paths(value: Any) -> Any:
    """A configuration in which absolute paths are names: the rest of a path means nothing elsewhere."""
    if isinstance(value, dict):
        return {name: _without_paths(entry) for name, entry in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _dataset(runs: Records, results: Mapping[str, Any] | None) -> str | None:
    names = [run.get("data", {}).get("name") for run, _ in runs.values()]
    names.append((results or {}).get("dataset"))
    return next((str(name) for name in names if name), None)


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


# --- The Hub ----------------------------------------------------------------------------------------------------------


def repository_files(folder: str | Path) -> dict[str, int]:
    """Path in the repository to size in bytes of everything in a folder, hidden files and folders apart."""
    folder = user_path(folder)
    paths = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {path.as_posix(): (folder / path).stat().st_size for path in shown}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Push a folder as one commit. Files that an interrupted push has left on the Hub are not sent again.

    A card in the repository that was not made by this package stays as it is.

    Args:
        folder: what `export_run` wrote, or any model repository.
        repo_id: `user/name`; it is created where it does not exist.
        private: create it private. An existing public repository is refused.
        token: by default, the one that `hf auth login` stored or `HF_TOKEN` holds.
        revision: branch to commit to, created where it does not exist.
        create_pr: open a pull request in place of a commit.
        commit_message: first line of the commit's message.

    Returns:
        Address of the commit.

    Raises:
        InputError: no token, no permission, no network, no such name; the repository has no half of the files then.
    """
    check_repo_id(repo_id)
    folder = user_path(folder)
    files = repository_files(folder)
    require("model_index.json" in files, "folder", "hold a saved pipeline", str(folder))
    token = token or get_token()
    require(token is not None, "token", "be there to push: run `hf auth login`, or set HF_TOKEN", None)
    operations = [CommitOperationAdd(path, _contents(Path(folder), path, repo_id)) for path in files]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            public = api.repo_info(repo_id).private is False
            require(not public, "private", f"be left out for {repo_id}, which is public", private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if _has_card_of_its_own(api, repo_id, revision):
            operations = [operation for operation in operations if operation.path_in_repo != "README.md"]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {Path(folder).resolve().name}",
            revision=revision,
            create_pr=create_pr,
        )
    except OfflineModeIsEnabled as error:
        raise InputError(f"`repo` {repo_id!r} cannot be reached: HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        raise InputError(f"`repo` {repo_id!r} refused the push: {_reason(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(f"`repo` {repo_id!r} cannot be reached: {_first_line(error)}") from error
    return str(commit.pr_url or commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub cannot take for a repository's name.

    Raises:
        InputError: naming it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"`repo` must be user/name, got {repo_id!r} ({_first_line(error)})") from error


def _contents(folder: Path, path: str, repo_id: str) -> Path | bytes:
    """A file of the folder; the card loads from where it is pushed to."""
    if path != "README.md":
        return folder / path
    card = (folder / path).read_text(encoding="utf-8")
    return re.sub(r'(Pipeline\.from_pretrained\()"[^"]+"', rf'\1"{repo_id}"', card).encode()


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository's card was written by someone else."""
    try:
        file = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except (HfHubHTTPError, OSError):
        return False
    return MARK not in Path(file).read_text(encoding="utf-8")


def _reason(error: HfHubHTTPError) -> str:
    """What the Hub said, or what its status means, in one line."""
    status = error.response.status_code if error.response is not None else None
    meaning = {401: "the token is not valid", 403: "the token has no permission to write there"}.get(status or 0)
    return meaning or error.server_message or _first_line(error)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
