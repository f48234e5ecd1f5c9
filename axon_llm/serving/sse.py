"""Server-sent events, as bytes.

The format is the WHATWG's; this file writes the narrow part of it that every client reads alike: LF line ends only,
``data: `` with the space, one line of data for each event. JSON is written in ASCII, so that U+2028, U+0085 or a
carriage return inside a token cannot look like the end of a line to a client that splits by its language's idea of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"


def encode(data: Mapping[str, Any], sequence: int | None = None) -> bytes:
    """One event.

    Args:
        data: the JSON object to send.
        sequence: sent as the event's ``id``, which a browser's ``EventSource`` returns as ``Last-Event-ID`` when it
            reconnects. It follows the data, for the sake of clients that look only at how an event begins.
    """
    text = json.dumps(data, separators=(",", ":"))
    tail = "" if sequence is None else f"id: {sequence}\n"
    return f"data: {text}\n{tail}\n".encode("ascii")
