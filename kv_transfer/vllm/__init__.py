"""The part of the KV stream that depends on vLLM: a connector that vLLM loads, with two sides.

connector       the hooks that vLLM calls, each forwarded to one of the two sides
scheduler_side  in the engine core: decides which requests send or receive, with which blocks
worker_side     in each rank: starts the KV stream and tells it about the engine's steps
metadata        what both sides tell each other in each step
cpu_packing     the order in which vLLM's CPU kernels store a block
metrics         reports how receives ended, as vLLM statistics and Prometheus metrics
"""
