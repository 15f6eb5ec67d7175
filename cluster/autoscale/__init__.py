"""Runs the autoscaling policy on a live cluster: observes, decides once a second, and carries out.

Nothing here imports Ray; ``cluster.ray.worker_apps`` does what needs it.
"""
