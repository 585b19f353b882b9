"""Clients of AWS and of services that speak its protocols: credentials that are renewed, and errors with their fix."""

from sdpipeline.aws.clients import make_client
from sdpipeline.aws.errors import error_code, explained, library_errors

__all__ = ["error_code", "explained", "library_errors", "make_client"]
