"""The code that only decode workers run: the Decode service.

This package may import neither Ray, nor the prefill pool, nor anything that handles text.
"""
