"""Components of pipelines, in addition to diffusers' own models."""
