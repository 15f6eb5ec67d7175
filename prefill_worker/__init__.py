"""The code that only prefill workers run: the Prefill service.

This package may import neither Ray, nor the decode pool, nor anything that handles text.
"""
