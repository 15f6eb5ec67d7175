"""What all server-side packages share: types, errors, configuration, state, RPC helpers, models.

Nothing here may import a worker, an engine, the router or Ray.
"""
