"""Turn a large pre-trained transformer into a small one while it is being distilled. The story is train.py's."""

import os

# Threads of an OpenMP team wait for each other by spinning, and a spinning thread keeps the one it waits for from
# running where another program has taken a core: training became 20 times slower on a laptop with something else to do.
# Spin briefly, then sleep. libgomp reads this when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
