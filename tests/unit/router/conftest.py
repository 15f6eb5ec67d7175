from __future__ import annotations

from hypothesis import settings

# Time limits per example fail on a busy machine; each test has a timeout of its own.
settings.register_profile("no-deadline", deadline=None, print_blob=True)
settings.load_profile("no-deadline")
