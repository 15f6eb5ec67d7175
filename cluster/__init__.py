"""Orchestration: starts, watches, scales and stops a cluster. Contains the command line.

Requests and tokens never pass through this package.
"""
