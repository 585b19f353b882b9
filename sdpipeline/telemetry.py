"""Logs: constant event names with fields, on stderr, for people or for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from sdpipeline.presentation.escaping import terminal
from sdpipeline.settings import Settings


def configure_logging(s: Settings) -> None:
    """Set up structlog as the settings ask; stdout stays free for results."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if s.log_format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([_without_controls] if s.log_format == "console" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[s.log_level.upper()]),
        # Looked up for each line: whoever redirects stderr meanwhile gets what follows.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _without_controls(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Show control characters of fields as what they are: names and errors may come from anybody's file."""
    return {name: terminal(value) if isinstance(value, str) else value for name, value in event.items()}
