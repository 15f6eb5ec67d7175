"""Resolves the configured model to files that engines and the router load.

Nothing here may keep a model in memory. The conversion runs in a separate process.
"""
