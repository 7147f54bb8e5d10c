"""Optimal transport in the training loss, in the sampler and at the starting point of diffusion models.

The names below are loaded on first use, so that `import ot_diffusers` costs nothing. Once both are imported,
`diffusers.DiffusionPipeline` loads the pipelines of this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_pipelines

if TYPE_CHECKING:
    from .guidance import OTGuidance
    from .models.backbone_extractor import BackboneFeatureExtractor
    from .models.denoiser_extractor import DenoiserFeatureExtractor
    from .models.feature_extractor import ConvFeatureExtractor, ResidualFeatureExtractor
    from .models.guidance_field import GuidanceField
    from .models.prior import FewStepPrior, GaussianPrior, PriorGenerator
    from .models.reference_bank import ReferenceBank
    from .models.semidiscrete_coupling import SemidiscreteCoupling
    from .pipelines.pipeline_flow_match import FlowMatchPipeline
    from .pipelines.pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
    from .pipelines.pipeline_truncated_prior import TruncatedPriorPipeline
    from .schedules import truncated_scheduler
    from .transport import sinkhorn_divergence

__version__ = "0.1.0"

_MODULES = {
    "BackboneFeatureExtractor": ".models.backbone_extractor",
    "ConvFeatureExtractor": ".models.feature_extractor",
    "DenoiserFeatureExtractor": ".models.denoiser_extractor",
    "FewStepPrior": ".models.prior",
    "FlowMatchPipeline": ".pipelines.pipeline_flow_match",
    "GaussianPrior": ".models.prior",
    "GuidanceField": ".models.guidance_field",
    "OTGuidance": ".guidance",
    "OTGuidedDDIMPipeline": ".pipelines.pipeline_ot_guided_ddim",
    "PriorGenerator": ".models.prior",
    "ReferenceBank": ".models.reference_bank",
    "ResidualFeatureExtractor": ".models.feature_extractor",
    "SemidiscreteCoupling": ".models.semidiscrete_coupling",
    "TruncatedPriorPipeline": ".pipelines.pipeline_truncated_prior",
    "sinkhorn_divergence": ".transport",
    "truncated_scheduler": ".schedules",
}

__all__ = [
    "BackboneFeatureExtractor",
    "ConvFeatureExtractor",
    "DenoiserFeatureExtractor",
    "FewStepPrior",
    "FlowMatchPipeline",
    "GaussianPrior",
    "GuidanceField",
    "OTGuidance",
    "OTGuidedDDIMPipeline",
    "PriorGenerator",
    "ReferenceBank",
    "ResidualFeatureExtractor",
    "SemidiscreteCoupling",
    "TruncatedPriorPipeline",
    "__version__",
    "sinkhorn_divergence",
    "truncated_scheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_pipelines()
