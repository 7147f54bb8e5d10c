"""The Hub: a run as a repository in a folder, its card, and the push."""

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
