"""The Serve application, its deployments and the head node. Only this folder may import Ray.

Requests and tokens never pass through Ray.
"""
