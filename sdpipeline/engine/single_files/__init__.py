"""Conversion of weights in one safetensors file into a checkpoint folder, offline."""
