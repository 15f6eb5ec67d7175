"""Which requests run, wait or are refused. README.md explains the policy.

Nothing here may choose workers; ``policy`` does no I/O and reads no clock.
"""
