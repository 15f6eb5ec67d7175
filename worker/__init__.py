"""The code that prefill and decode workers share: replica, intake and liveness probe.

This package may import neither Ray nor the protocol of a pool.
"""
