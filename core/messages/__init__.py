"""The messages between routers and workers, and those in the journal. Generated from proto/.

They are internal, so they are not part of the public package ``baton``.
"""
