"""Reconciliation, recovery after a restore, and retention."""
