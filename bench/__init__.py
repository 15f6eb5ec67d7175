"""Benchmarks. They print and save timings and assert none. docs/measurements.md has results."""
