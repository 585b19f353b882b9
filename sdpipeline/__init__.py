"""Batch image generation with a queue that loses no job and pictures with verifiable provenance."""

__version__ = "0.1.0"
