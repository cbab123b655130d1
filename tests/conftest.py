"""What every test shares."""

import os

from hypothesis import settings

# No deadline: the first call of a compiled kernel takes as long as it takes. In CI the examples are the same each time,
# so that a change is not blamed for a rare find; elsewhere they are new each time, so that rare finds are made.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable" if os.environ.get("CI") else "explore")
