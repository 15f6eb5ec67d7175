"""What all server-side packages share: values, errors, configuration, state, RPC helpers, models.

Nothing here may import a worker, an engine, the router or Ray.
"""
