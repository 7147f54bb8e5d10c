"""`report`, `card`, `push`, `info` and `completion`: commands that show or publish what is there."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import extra, require
from ..files import check_file, is_own
from .process import prepare_libraries

MEGABYTE = 1e6


def run_card(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Write a run as a folder that is ready for the Hub."""
    prepare_libraries()
    from ..hub.push import export_run, repository_files

    folder = export_run(arguments.run, arguments.output, **_export_options(arguments))
    return _print(_listing(repository_files(folder), str(folder)))


def run_push(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Upload a run, or a folder that `card` wrote, to the Hub."""
    prepare_libraries()
    from huggingface_hub.utils import disable_progress_bars

    from ..hub.push import check_repo_id, export_run, file_sizes, find_token, outgoing_files, push_files

    check_repo_id(arguments.repo)
    if not arguments.dry_run:
        find_token()
    if not sys.stderr.isatty():
        disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.run)
        if not is_repository(folder):
            folder = export_run(folder, Path(scratch) / folder.resolve().name, **_export_options(arguments))
        files = outgoing_files(folder)
        sizes, url, repo = file_sizes(files), None, arguments.repo
        if not arguments.dry_run:
            options = {"private": arguments.private or None, "revision": arguments.revision}
            message = arguments.message or f"Upload {folder.resolve().name}"
            url = push_files(files, repo, commit_message=message, **options)
            repo = "/".join(urlsplit(url).path.split("/")[1:3])  # with the user, where the name came without
    if arguments.json:
        return _print([_json({"repo": repo, "pushed": url is not None, "url": url, "files": sizes})])
    return _print(_listing(sizes, f"{repo}; nothing was uploaded" if url is None else url))


def is_repository(folder: Path) -> bool:
    """Whether the folder is ready for the Hub: a pipeline with its card, and not the folder of a run."""
    has_card = (folder / "README.md").is_file() and (folder / "model_index.json").is_file()
    return has_card and not (folder / "run.json").is_file()


def _export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ["features", "denoiser", "results", "arm", "beside", "hardware", "truncation_timestep"]
    names += ["dtype", "num_images", "num_inference_steps"]
    return {"repo_id": arguments.repo} | {name: getattr(arguments, name) for name in names}


def _listing(files: dict[str, int], where: str) -> list[str]:
    lines = [f"{size / MEGABYTE:9.3f} MB  {name}" for name, size in files.items()]
    return [*lines, f"{sum(files.values()) / MEGABYTE:9.3f} MB in {len(files)} files: {where}"]


def run_info(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Describe a saved pipeline."""
    prepare_libraries()
    facts = describe_pipeline(arguments.pipeline)
    if arguments.json:
        return _print([_json(facts)])
    rows = [(name.replace("_", " "), value) for name, value in facts.items() if value is not None]
    width = max(len(name) for name, _ in rows)
    return _print(line for name, value in rows for line in _rows(name.ljust(width), value))


def describe_pipeline(path: str) -> dict[str, Any]:
    """Class, parts, scheduler, images and origin of a saved pipeline.

    Raises:
        InputError: no pipeline there.
    """
    from ..hub.push import parameters, scheduler_facts
    from ..pipelines.call import unet_image_shape
    from ..sampling import load_pipeline

    pipeline = load_pipeline(path)
    image_shape = getattr(pipeline, "image_shape", None) or unet_image_shape(pipeline.unet)
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    references = parts["reference_bank"].config if "reference_bank" in parts else None
    return {
        "pipeline": type(pipeline).__name__,
        "parts": {name: type(part).__name__ for name, part in parts.items()},
        "parameters": parameters(pipeline),
        "image_shape": list(image_shape),
        **scheduler_facts(pipeline),
        "num_references": references.num_samples if references else None,
        "dataset": references.dataset if references else None,
    }


def _rows(name: str, value: Any) -> list[str]:
    """One line, or a line for each entry of a mapping."""
    if not isinstance(value, dict):
        return [f"{name}  {'×'.join(map(str, value)) if isinstance(value, list) else value}"]
    width = max(len(key) for key in value)
    names = [name, *[" " * len(name)] * (len(value) - 1)]
    entries = [(key.ljust(width), f"{entry:,}" if isinstance(entry, int) else entry) for key, entry in value.items()]
    return [f"{start}  {key}  {entry}" for start, (key, entry) in zip(names, entries, strict=True)]


def run_report(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """`results.json` as a table and as one HTML file with its pictures."""
    prepare_libraries()
    from ..hub.push import read_results
    from ..reporting.page import REPORT
    from ..reporting.report import text_table, write_report
    from ..studies.pictures import pictures_beside
    from ..studies.results import tables

    path = Path(arguments.results)
    file = path / "results.json" if path.is_dir() else path
    results = read_results(file)
    if arguments.json:
        return _print([_json(results)])
    output = check_file(file.with_name("report.html") if arguments.output is None else arguments.output)
    free = not os.path.lexists(output) or is_own(output, REPORT)
    require(free, "output", "be a new file, or a page of ot-diffusers that nobody has changed since", str(output))
    with tempfile.TemporaryDirectory() as scratch:
        pictures = pictures_beside(results, file, Path(scratch))
        write_report(results, pictures, output, tables=tables(results))
    return _print([text_table(results), str(output)])


def run_completion(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """The script that completes commands and options in a shell."""
    with extra("completion"):
        import shtab
    return _print([shtab.complete(arguments.make_parser(), arguments.shell)])


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _print(lines: Iterable[str]) -> int:
    for line in lines:
        print(line)
    return 0
