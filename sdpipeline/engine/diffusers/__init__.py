"""The engine on diffusers pipelines."""
