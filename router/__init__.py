"""The router: applications connect to it. It owns text, admission, placement and retries.

Nothing here may know about Ray, or how a worker runs its engine.
"""
