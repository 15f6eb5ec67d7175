"""State in Redis: the registry of workers, the journal of requests, orders to the launcher.

Only ``core.state.redis`` may import the Redis driver. Nothing here decides what the state means for
a request.
"""
