"""The command ``baton``: one module for each command, and how output looks.

Nothing here may import Ray, vLLM or torch at import time: commands must start quickly.
"""
