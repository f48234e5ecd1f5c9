"""For every test: one thread of arithmetic each, here and in what tests start.

The models are tiny: threads would spend their time waiting for each other, and for the other tests on the machine.
"""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with contextlib.suppress(ModuleNotFoundError):  # tests on a GPU do without
    from hypothesis import settings

    settings.register_profile("axon", deadline=None)  # no test fails for the time it takes
    settings.load_profile("axon")
