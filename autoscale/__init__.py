"""The autoscaling policy: its file, and the pure function that decides. README.md explains it.

Nothing here does I/O (except ``load``) or reads a clock, so that the cluster and the simulator
decide alike.
"""
