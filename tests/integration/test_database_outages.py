"""Outages that the database reports itself: workers wait for their end, commands say what is wrong in one line."""
