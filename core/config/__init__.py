"""The configuration of a cluster: its schema, how a file is read, and its error messages.

Only ``load`` reads a file, or this machine's CPU cores. The package starts nothing.
"""
