"""Text from tables, records and errors on its way to people: escaped for the place it is shown in."""
