"""For `DiffusionPipeline.from_pretrained(…, custom_pipeline="pipeline", trust_remote_code=True)`."""

from ot_diffusers import FlowMatchPipeline as Pipeline  # pip install ot-diffusers

__all__ = ["Pipeline"]
