"""The engine protocol, and a fake engine with a latency model.

Nothing here may know gRPC or the registry; what depends on vLLM is in ``engine.vllm``.
"""
