"""Clients of AWS and compatible services, with renewed credentials and errors that name their fix."""

from sdpipeline.aws.clients import make_client
from sdpipeline.aws.errors import error_code, explained, library_errors

__all__ = ["error_code", "explained", "library_errors", "make_client"]
