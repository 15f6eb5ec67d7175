"""The seam to the inference engine: a small protocol, vLLM behind it, and a fake."""
