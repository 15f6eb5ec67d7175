"""The engine protocol, and a fake engine with a latency model.

This package may import neither gRPC nor the registry. Code that depends on vLLM is in
``engine.vllm``.
"""
