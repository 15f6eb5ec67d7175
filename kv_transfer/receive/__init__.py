"""The decode side of the KV stream."""
