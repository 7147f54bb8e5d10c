"""The Hub: writes a run and its card as a repository in a folder, and pushes it."""

from .push import (
    check_repo_id,
    choose_arm,
    export_run,
    file_sizes,
    find_token,
    parameters,
    push_files,
    push_folder,
    push_part,
    push_pipeline,
    read_results,
    repository_files,
    scheduler_facts,
    write_repository,
)

__all__ = [
    "check_repo_id",
    "choose_arm",
    "export_run",
    "file_sizes",
    "find_token",
    "parameters",
    "push_files",
    "push_folder",
    "push_part",
    "push_pipeline",
    "read_results",
    "repository_files",
    "scheduler_facts",
    "write_repository",
]
