"""Campaign files: loading, validation, expansion into jobs, and submission."""

from sdpipeline.campaigns.loader import Campaign, Catalog, load
from sdpipeline.campaigns.submission import plan, submit

__all__ = ["Campaign", "Catalog", "load", "plan", "submit"]
