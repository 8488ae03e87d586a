"""Scores of a run, and its figures, report and export.

`metrics` may be imported by the core; the others import the core, never `predict` or `driver`.
"""
