"""Campaign files: read, check, expand into jobs, and submit."""
