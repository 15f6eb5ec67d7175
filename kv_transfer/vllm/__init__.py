"""All that depends on vLLM: the connector that it loads, and its two sides."""
