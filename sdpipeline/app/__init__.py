"""Composition root: settings become open databases, stores, keys and workers."""
