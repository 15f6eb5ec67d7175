"""State in Redis: the registry of workers, the journal of requests, orders to the launcher.

Only ``redis`` may import the driver; nothing here may decide what the state means for a request.
"""
