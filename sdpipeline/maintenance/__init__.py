"""Reconciliation, restore and retention."""
