"""The only folder that may import Ray: the Serve application, its deployments, the head node.

Nothing here may touch a request.
"""
