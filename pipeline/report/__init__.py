"""Compares runs from their own records: a table, one HTML file, and a run's model card. Imports no torch."""
