"""A small trained checkpoint, its recipe and its evaluation, so that a first run needs no download."""
