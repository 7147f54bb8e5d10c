"""Saving and loading of both pipelines: repositories load without this package too, and weights are never pickled.

In `model_index.json`, a part whose class belongs to this package has no library: `[null, "ReferenceBank"]`. diffusers
treats such a part as absent, so that a guided repository loads as a plain `DDIMPipeline` where this package is not
installed; diffusers would refuse a repository that names an unknown library. The pipelines here find the class.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..errors import require
from ..models.backbone_extractor import BackboneFeatureExtractor
from ..models.denoiser_extractor import DenoiserFeatureExtractor
from ..models.feature_extractor import ConvFeatureExtractor, ResidualFeatureExtractor
from ..models.guidance_field import GuidanceField
from ..models.portable import hub, take_push_options, to_json, with_known_dtype, without_origin
from ..models.prior import FewStepPrior, GaussianPrior, PriorGenerator
from ..models.reference_bank import ReferenceBank
from .classes import class_options
from .latents import SAME_PARTS, check_has_no_text

if TYPE_CHECKING:
    from typing import Self

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

PARTS = (
    BackboneFeatureExtractor,
    ConvFeatureExtractor,
    DenoiserFeatureExtractor,
    FewStepPrior,
    GaussianPrior,
    GuidanceField,
    PriorGenerator,
    ReferenceBank,
    ResidualFeatureExtractor,
)
"""Parts that a repository may name."""

# diffusers looks up the base class of models in the module that a part is loaded from, which is this one.
__all__ = ["PARTS", "ModelMixin", "PortablePipeline", "register", *(part.__name__ for part in PARTS)]

CODE_NAME = "pipeline.py"
CODE = '''"""For `DiffusionPipeline.from_pretrained(…, custom_pipeline="pipeline", trust_remote_code=True)`."""

from ot_diffusers import {name} as Pipeline  # pip install ot-diffusers

__all__ = ["Pipeline"]
'''
# The same name everywhere: diffusers runs the code of all local folders in one module, which must hold one pipeline.


class PortablePipeline(DiffusionPipeline):
    """A `DiffusionPipeline` whose saved folder does not depend on where it was loaded from."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """As `DiffusionPipeline.from_pretrained`, from a folder or a Hub id; weights must be safetensors unless
        `use_safetensors=False` is given."""
        if not kwargs.get("trust_remote_code"):
            check_holds_no_code(pretrained_model_name_or_path)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **with_known_dtype(kwargs))

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **parts: Any,
    ) -> Self:
        """A pipeline that shares the parts of another one.

        The method of diffusers drops parts whose class is not exactly the annotated one, and casts the others to
        float32, in the other pipeline too. Here all parts stay as they are.

        Args:
            pipeline: any pipeline whose denoiser is a `UNet2DModel`; for `OTGuidedDDIMPipeline` also a `DiTPipeline`,
                and pipelines of latents, whose `vqvae` becomes the `vae` here.
            dtype: dtype of all parts, which are cast in `pipeline` too; by default each keeps its own.
            torch_dtype: an older name of `dtype`.
            parts: parts by name that replace those of `pipeline`.

        Raises:
            InputError: an unknown part, a required part that is missing, such as the VAE of a pipeline of latents, or a
                pipeline that is conditioned on text.
        """
        kind, is_ours = type(pipeline).__name__, isinstance(pipeline, PortablePipeline)
        components = {SAME_PARTS.get(part, part): value for part, value in pipeline.components.items()}
        check_has_no_text(components, kind)
        needed = {name: one for name, one in inspect.signature(cls.__init__).parameters.items() if name != "self"}
        unknown = [name for name in parts if name not in needed]
        require(not unknown, unknown[0] if unknown else "", f"be one of {', '.join(needed)}", "another argument")
        kinds = cls._get_signature_types()
        has_latents = components.get("vae") is not None or ("vae" in components and not is_ours)
        pixels = f"generate pixels, not latents, for a {cls.__name__}"
        require(not has_latents or "vae" in needed, "pipeline", pixels, kind)
        shared = {name: part for name, part in components.items() if name in needed}
        if not is_ours:
            shared = {name: part for name, part in shared.items() if _fits(part, kinds[name])}
        options = {name: value for name, value in class_options(pipeline).items() if name in needed}
        chosen = shared | options | parts
        for name, parameter in needed.items():
            given = parameter.default is not parameter.empty or chosen.get(name) is not None
            require(given, name, f"be given, as no part of a {kind} fits", None)
        decodes = not has_latents or chosen.get("vae") is not None
        require(decodes, "vae", f"be given for the latents of a {kind}", None)
        made = cls(**chosen)
        return made.to(dtype=dtype or torch_dtype) if dtype or torch_dtype else made

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As `DiffusionPipeline.save_pretrained`, with a `pipeline.py` for programs that do not import this package;
        weights are always safetensors, and `safe_serialization` has no effect."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CODE_NAME).write_text(CODE.format(name=type(self).__name__), encoding="utf-8")
        push = take_push_options(folder, kwargs)
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        for part in folder.glob("*/config.json"):
            part.write_text(without_origin(part.read_text(encoding="utf-8")), encoding="utf-8")
        if push is not None:
            self.push_to_hub(**push)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        revision: str | None = None,
        results: str | Path | None = None,
        arm: str | None = None,
    ) -> str:
        """Push weights and a model card as one commit; returns the commit's address.

        Args:
            repo_id: `user/name`, or a name alone for a repository of the token's owner; it is created if it does not
                exist.
            commit_message: first line of the commit's message.
            private: create it private. An existing public repository is refused.
            token: access token; by default the one that `hf auth login` stored or `HF_TOKEN` holds.
            create_pr: open a pull request instead of a commit.
            safe_serialization: without effect, weights are always safetensors.
            variant: part of the weight files' names, such as `"fp16"`.
            revision: branch to commit to; it is created if it does not exist.
            results: `results.json` of an evaluation, comparison or demo, for the card.
            arm: the method in `results` that is this pipeline; needed where there are several.

        Raises:
            InputError: no token, no permission, no network; the repository is then as it was.
        """
        return hub().push_pipeline(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
            variant=variant,
            revision=revision,
            results=results,
            arm=arm,
        )

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """The classes that each part may have. diffusers 0.33 cannot read string annotations or `A | B`."""
        kinds = get_type_hints(cls.__init__)
        parameters = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        return {name: get_args(kinds[name]) or (kinds[name],) for name in parameters}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, with the module of each part of this package.

        Raises:
            InputError: the folder of a pipeline of text, or of diffusers' pipelines whose parts have other names.
        """
        name = str(config_dict.get("_class_name"))
        check_has_no_text(config_dict, name)
        takes_over = f"be loaded as it is and given to {cls.__name__}.from_pipe"
        require(not SAME_PARTS.keys() & config_dict.keys(), "pipeline", takes_over, name)
        located = {name: _located(entry) for name, entry in config_dict.items()}
        return super().extract_init_dict(located, **kwargs)

    def to_json_string(self) -> str:
        """The contents of `model_index.json`."""
        config = json.loads(without_origin(super().to_json_string()))
        return to_json({name: _unlocated(entry) for name, entry in config.items()})


def check_holds_no_code(path: str | os.PathLike[str]) -> None:
    """Refuse a folder whose index names Python code for a part or the whole pipeline: diffusers 0.33 runs it unasked.

    Raises:
        InputError: such code, with the names of its files. Code in a repository on the Hub is refused by diffusers.
    """
    if os.path.isfile(os.path.join(path, "model_index.json")):
        index = DiffusionPipeline.load_config(path)
        named = {part: entry[0] for part, entry in index.items() if isinstance(entry, (list, tuple)) and entry}
        code = [f"{library}.py" if part == "_class_name" else f"{part}/{library}.py" for part, library in named.items()]
        present = [file for file in code if os.path.isfile(os.path.join(path, file))]
        require(not present, "pipeline", "be a folder whose index names no code in it", ", ".join(present))


def register(kind: type[Pipeline]) -> type[Pipeline]:
    """Class decorator: make the class an attribute of `diffusers`, where `from_pretrained` looks it up."""
    setattr(diffusers, kind.__name__, kind)
    return kind


def _fits(part: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a pipeline can take over a part: one of these classes or a derived one, or a wrapped module."""
    return isinstance(part, (*kinds, type(None))) or (isinstance(part, nn.Module) and not isinstance(part, ModelMixin))


def _located(entry: Any) -> Any:
    """`[None, class]` as `[this module, class]` for a class of this package."""
    return [__name__, entry[1]] if _names_part(entry) else entry


def _unlocated(entry: Any) -> Any:
    """`[module, class]` as `[None, class]` for a class of this package."""
    return [None, entry[1]] if _names_part(entry) else entry


def _names_part(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names a class of this package, with its module or without."""
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
        return False
    library, name = entry
    ours = library is None or str(library).split(".")[0] == __name__.split(".")[0]
    return ours and name in {part.__name__ for part in PARTS}
