"""Turns text into tokens and back: chat template, tokeniser, detokeniser, stop strings.

Nothing here may know about workers.
"""
