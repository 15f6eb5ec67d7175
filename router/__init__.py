"""The router: applications connect here; it owns text, admission, placement and retries.

Nothing here may know Ray, or how a worker runs its engine.
"""
