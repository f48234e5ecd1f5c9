"""``python -m tests.faults.tiny_worker``.

A worker process with the tiny engine, configured by ``AXON_*`` variables alone.
"""

from __future__ import annotations

import logging
import os
import sys

from axon_llm.errors import AxonError
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.settings import read_settings
from axon_llm.serving.worker_process import serve
from tests.faults import tiny_engine


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    slots = int(os.environ.get("TINY_SLOTS", "4"))
    step_s = float(os.environ.get("TINY_STEP_S", "0.01"))
    try:
        serve(
            read_settings(),
            lambda: ServedModel(
                engine=tiny_engine.TinyEngine(slots, step_s),
                encode=tiny_engine.encode,
                spell=tiny_engine.spell,
                models=(tiny_engine.model_card(),),
            ),
        )
    except AxonError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
