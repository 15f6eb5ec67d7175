"""The live workers, as the registry lists them, and a channel to each.

Nothing here may choose between workers.
"""
