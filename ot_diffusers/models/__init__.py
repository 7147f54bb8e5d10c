"""What a pipeline is made of beside diffusers' own models."""
