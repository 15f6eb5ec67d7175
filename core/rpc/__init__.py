"""What every gRPC server and client of ours shares: status codes, options, calls in flight.

Nothing here may know which service is served.
"""
