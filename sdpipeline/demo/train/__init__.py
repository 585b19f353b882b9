"""Training recipe of the demo's checkpoints: `python -m sdpipeline.demo.train all`."""
