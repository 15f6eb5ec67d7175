"""What of the KV stream depends on vLLM: the connector that it loads, CPU packing, metrics.

It imports nothing by itself, because vLLM takes seconds to import.
"""
