"""Runs the policies of admission, placement and autoscaling on a trace, in virtual time."""
