"""A whole cluster on one machine: launcher, reaper, run folder, embedded Valkey.

Nothing here may import Ray; ``launch`` reaches it through ``cluster.ray``.
"""
