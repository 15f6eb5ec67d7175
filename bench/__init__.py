"""Measurements. Timings are printed and saved, never asserted; docs/measurements.md keeps them."""
