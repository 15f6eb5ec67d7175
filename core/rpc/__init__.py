"""What all of Baton's gRPC servers and clients share: status codes, options, calls in flight.

Nothing here may depend on a particular service.
"""
