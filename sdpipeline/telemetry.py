"""Logs: constant event names with fields, on stderr, for people or for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from sdpipeline.settings import Settings


def configure_logging(s: Settings) -> None:
    """Set up structlog as the settings ask; stdout stays free for results."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if s.log_format == "console":
        # The default shows local variables, prompts and passwords among them.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[s.log_level.upper()]),
        # Looked up for each line: whoever redirects stderr meanwhile gets what follows.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
