"""The public protocol: checks requests, runs them, and turns tokens into responses.

Nothing here may choose workers.
"""
