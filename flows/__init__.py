"""The Prefect flows: thin, they call sdpipeline."""
