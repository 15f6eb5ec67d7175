"""The cluster's configuration: its schema, how a file becomes one, and what its errors say.

Nothing here may read configuration anywhere but in ``load``, or act on it.
"""
