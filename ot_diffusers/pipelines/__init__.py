"""The pipelines. They are imported together: whichever module comes first, both are known to diffusers afterwards."""

from .pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .pipeline_truncated_prior import TruncatedPriorPipeline

__all__ = ["OTGuidedDDIMPipeline", "TruncatedPriorPipeline"]
