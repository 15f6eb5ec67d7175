"""Configuration, state, launch and command line of a Baton cluster."""
