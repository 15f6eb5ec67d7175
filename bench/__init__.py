"""Measurements: print and save timings, never assert them. docs/measurements.md has results."""
