"""Which workers serve a request. README.md explains the policy.

Nothing here may call a worker; ``policy`` does no I/O and reads no clock.
"""
