"""What prefill and decode workers share: the replica, its intake, its health.

Nothing here may know a pool's protocol, or Ray.
"""
