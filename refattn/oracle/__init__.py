"""Validation of a backend against the golden suite: comparison, report, and what it does differently in words."""

from __future__ import annotations

from refattn.oracle.report import Report
from refattn.oracle.validate import validate

__all__ = ["Report", "validate"]
