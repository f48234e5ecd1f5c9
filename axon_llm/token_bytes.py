"""Tokens to bytes, for the two ways in which decoder models' tokenizers write bytes into the names of tokens.

GPT-2's alphabet has a printable character for each byte; SentencePiece has text, ``▁`` for a space, and ``<0x0A>`` for
a byte that is no text. Next: ``tokenizer.py``.
"""

from __future__ import annotations

import json
import re

import tokenizers

from axon_llm.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenBytes:
    """Token id → the bytes it stands for, worked out when first asked for.

    Args:
        backend: the tokenizers library's object.
        added: ids of added tokens, whose names are text.
        show_nameless: whether a token without a name, of which models have some so that their size is a round number,
            shows as its id; otherwise it stands for nothing.

    Attributes:
        strips_first_space: a whole text begins with a space of the tokenizer's making (SentencePiece).

    Raises:
        TokenizerError: the tokenizer's decoder is of a kind that is not known.
    """

    def __init__(self, backend: tokenizers.Tokenizer, added: frozenset[int], *, show_nameless: bool = False) -> None:
        self._backend, self._added, self._show_nameless = backend, added, show_nameless
        self._known: dict[int, bytes] = {}
        decoder = json.loads(backend.to_str()).get("decoder") if backend.decoder is not None else None
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        unknown = kinds - {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
        if unknown:
            raise TokenizerError(f"tokenizer decoder {', '.join(sorted(unknown))} is not supported")
        self.strips_first_space = any(
            (step["type"] == "Strip" and step.get("start"))
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )

    def __getitem__(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._work_out(token)
        return self._known[token]

    def _work_out(self, token: int) -> bytes:
        name = self._backend.id_to_token(token)
        if name is None:
            return nameless(token).encode() if self._show_nameless else b""
        if token in self._added:
            return name.encode()
        if self._byte_level:
            codes = [BYTE_OF_CHARACTER.get(character) for character in name]
            return name.encode() if None in codes else bytes(code for code in codes if code is not None)
        if byte := _BYTE_TOKEN.match(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()


def nameless(token: int) -> str:
    """What to call a token that the tokenizer has no name for."""
    return f"⟨{token}⟩"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character; those that are not printable come after U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
