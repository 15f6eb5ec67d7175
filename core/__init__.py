"""The ground of the server side: shared values, errors, configuration, state, RPC helpers, models.

Nothing here may import a worker, an engine, the router or Ray.
"""
