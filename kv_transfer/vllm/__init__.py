"""Everything that depends on vLLM: the connector that it loads, and both sides of it.

connector       the hooks that vLLM calls, each forwarded to one of the two sides
scheduler_side  in the engine core: which requests send or receive, and with which blocks
worker_side     in each rank: starts the KV stream and tells it about the engine's steps
metadata        what both sides tell each other in each step
cpu_packing     the order in which vLLM's CPU kernels store a block
metrics         reports of receives, as vLLM statistics and Prometheus metrics
"""
