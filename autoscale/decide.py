"""Decides how many workers each pool should have. Pure."""
