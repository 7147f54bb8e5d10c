"""What this package's models add to loading: safetensors only, and a subfolder of a folder means just that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from diffusers.models.modeling_utils import ModelMixin


class PortableModel(ModelMixin):
    """A `ModelMixin` that does not read a pickle unless it is asked to."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As `ModelMixin.from_pretrained`, from a folder or a Hub id; weights are read as safetensors unless
        `use_safetensors=False` asks for others."""
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        path, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder")
        if path is not None and subfolder and Path(path).is_dir():
            # diffusers would prefer weights that lie beside the subfolder.
            path = str(Path(path) / kwargs.pop("subfolder"))
        return super().from_pretrained(path, **kwargs)
