"""Campaign files: loading, validation, expansion into jobs, and submission."""
