"""Saving and loading of this package's models: safetensors only, and `subfolder` reads from that folder alone."""

from __future__ import annotations

import inspect
import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

if TYPE_CHECKING:
    from typing import Self

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")
"""Options of `save_pretrained(push_to_hub=True)` that are passed on to `push_to_hub`."""


class PortableModel(ModelMixin):
    """A `ModelMixin` that never writes pickle files, and reads them only on request."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As `ModelMixin.from_pretrained`, from a folder or a Hub id; weights are read as safetensors unless
        `use_safetensors=False`."""
        path, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder")
        if path is not None and subfolder and Path(path).is_dir():
            # diffusers would prefer weights in the parent folder.
            path = str(Path(path) / kwargs.pop("subfolder"))
        # In a folder without pickle files diffusers has no fallback, and its own error says best what is missing.
        pickle_free = path is not None and Path(path).is_dir() and not any(Path(path).glob("*.bin"))
        if kwargs.get("use_safetensors") is None and not pickle_free:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(path, **with_known_dtype(kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `ModelMixin.save_pretrained`; weights are always safetensors, whatever the value of
        `safe_serialization`."""
        push = take_push_options(save_directory, kwargs)
        super().save_pretrained(save_directory, *args, **kwargs | {"safe_serialization": True})
        if push is not None:
            self.push_to_hub(**push)

    # Pipelines pass on only the options in the signature.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """As `ModelMixin.push_to_hub`, in one commit; the files are first checked for local paths.

        Raises:
            InputError: no token, no permission or no network; the repository is then unchanged.
        """
        options: dict[str, Any] = {"private": private, "token": token, "create_pr": create_pr}
        return hub().push_part(
            self, repo_id, variant=variant, subfolder=subfolder, commit_message=commit_message, **options
        )

    def to_json_string(self) -> str:
        """The contents of `config.json`."""
        return without_origin(super().to_json_string())


def hub() -> ModuleType:
    """`ot_diffusers.hub`, imported by name: its layer is above the models, and only a push needs it."""
    return import_module("ot_diffusers.hub")


def take_push_options(save_directory: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the options of `push_to_hub` from those of `save_pretrained` and return them; None without a push."""
    pushes = options.pop("push_to_hub", False)
    named = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    defaults = {"repo_id": Path(save_directory).resolve().name, "variant": options.get("variant")}
    return defaults | named if pushes else None


def with_known_dtype(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained`, with `dtype` under the name that the installed version of diffusers uses."""
    return {DTYPE if name == "dtype" else name: value for name, value in options.items()}


def without_origin(config: str) -> str:
    """A JSON configuration without the local paths that it was loaded from."""
    return to_json(json.loads(config, object_hook=_without_origin))


def to_json(config: dict[str, Any]) -> str:
    """JSON in the format of diffusers' configurations."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_name_or_path"}
