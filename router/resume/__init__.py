"""Keeps requests in the journal, so that another router can resume them.

Nothing here may know which store is behind the journal.
"""
