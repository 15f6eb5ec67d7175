"""Runs a request on its workers: attempts, retries, the order of tokens.

Nothing here may know about text or the client's protocol.
"""
