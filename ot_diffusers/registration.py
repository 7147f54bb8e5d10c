"""Registration of the pipelines with `DiffusionPipeline.from_pretrained`, whichever package is imported first.

diffusers looks up a pipeline's class among its own attributes. The class is added there when diffusers imports its own
pipelines, so that importing this package alone imports nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PIPELINES = f"{__package__}.pipelines"
DIFFUSERS_PIPELINES = "diffusers.pipelines.pipeline_utils"


def register_pipelines() -> None:
    """Import the pipelines, which register themselves: now if diffusers has imported its own, else right after that."""
    if DIFFUSERS_PIPELINES in sys.modules:
        import_module(PIPELINES)
    else:
        sys.meta_path.insert(0, _AfterDiffusersPipelines())


class _AfterDiffusersPipelines(MetaPathFinder):
    """Finds one module of diffusers as Python would, and imports the pipelines after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DIFFUSERS_PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_import_ours(module: ModuleType) -> None:
                execute(module)
                import_module(PIPELINES)

            spec.loader.exec_module = execute_and_import_ours  # type: ignore[method-assign]
        return spec
