"""The pipelines. They are imported together, so that importing either one registers both with diffusers."""

from .pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .pipeline_truncated_prior import TruncatedPriorPipeline

__all__ = ["OTGuidedDDIMPipeline", "TruncatedPriorPipeline"]
