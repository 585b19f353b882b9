"""Composition root: build databases, stores, keys and workers from the settings."""
