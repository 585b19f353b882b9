"""Benchmarks of this machine: engine, whole pipeline, queue and storage, each against its components."""
