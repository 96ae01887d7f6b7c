"""Jobs: command lines, inputs, run directories, and what reads them."""

import os

# Before pyarrow is loaded, which looks at this once. Arrow's own allocators keep for each thread what it has once used:
# 5 to 15 MB of a run's memory that nobody needs.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
