"""Engines: each evaluates a Problem; none knows a variant or another engine."""
