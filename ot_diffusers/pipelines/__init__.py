"""The pipelines. They are imported together, so that importing one of them registers all with diffusers."""

from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_ot_guided_ddim import OTGuidedDDIMPipeline
from .pipeline_truncated_prior import TruncatedPriorPipeline

__all__ = ["FlowMatchPipeline", "OTGuidedDDIMPipeline", "TruncatedPriorPipeline"]
