"""The command ``baton``: one module for each command, and the formatting of the output.

No module here may import Ray, vLLM or torch at import time, because commands must start quickly.
"""
