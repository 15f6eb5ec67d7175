"""Keeps requests in the journal, so that another router can resume them.

Nothing here may know the store behind the journal.
"""
