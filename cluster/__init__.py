"""Orchestration: starts, watches, scales and stops a cluster; the command line.

No token passes through here.
"""
