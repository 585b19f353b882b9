"""Demo checkpoint, small and trained here, with its recipe and evaluation, so that a first run needs no download."""
