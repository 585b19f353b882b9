"""The database: the source of truth about campaigns, jobs, pictures and their history."""
