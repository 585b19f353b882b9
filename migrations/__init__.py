"""Schema migrations, run by ``sdpipeline db upgrade``."""
