"""A whole cluster on one machine: launcher, reaper, run folder and embedded Valkey.

No module here may import Ray; ``launch`` uses it through ``cluster.ray``.
"""
