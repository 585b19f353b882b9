"""The database: the truth about campaigns, jobs, pictures and what happened to them."""
