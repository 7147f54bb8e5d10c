"""What this package's models add to saving and loading: safetensors only, and a subfolder means just that."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Self

from diffusers.models.modeling_utils import ModelMixin


class PortableModel(ModelMixin):
    """A `ModelMixin` that writes no pickle, and does not read one unless it is asked to."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As `ModelMixin.from_pretrained`, from a folder or a Hub id; weights are read as safetensors unless
        `use_safetensors=False` asks for others."""
        path, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder")
        if path is not None and subfolder and Path(path).is_dir():
            # diffusers would prefer weights that lie beside the subfolder.
            path = str(Path(path) / kwargs.pop("subfolder"))
        # In a folder without a pickle diffusers has nothing else to fall back on, and says best what is missing.
        pickle_free = path is not None and Path(path).is_dir() and not any(Path(path).glob("*.bin"))
        if kwargs.get("use_safetensors") is None and not pickle_free:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `ModelMixin.save_pretrained`; weights are safetensors, whatever `safe_serialization` says."""
        super().save_pretrained(save_directory, *args, **kwargs | {"safe_serialization": True})

    # Pipelines pass on the options that the signature shows.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]
