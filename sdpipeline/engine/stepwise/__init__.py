"""Optional accelerations of the diffusers engine: call batching, caches, compilation, quantization."""
