"""The configuration of a cluster: its schema, how a file is read, and its error messages.

Only ``load`` reads configuration from a file or from this machine. Nothing here acts on it.
"""
