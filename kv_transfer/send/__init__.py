"""The prefill side of the KV stream."""
