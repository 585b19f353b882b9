"""Batch image generation with a queue that loses nothing and pictures that prove what made them."""

__version__ = "0.1.0"
