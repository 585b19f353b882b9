"""Archives of closed editions."""
