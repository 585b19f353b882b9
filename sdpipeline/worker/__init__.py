"""One worker process: lease a batch, generate, deliver."""
