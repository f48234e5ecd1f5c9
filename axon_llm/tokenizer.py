"""Text to tokens and back: ``tokenizer.json`` by the tokenizers library, and a decoder that streams valid UTF-8.

What a user types is text and nothing else: if it holds ``<|im_end|>``, the model reads those ten characters and not the
token that ends a turn. Only the chat template can write special tokens.

This file never imports torch: the session manager may use it.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from axon_llm.chat_template import ChatTemplate
from axon_llm.errors import RequestError, TokenizerError

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning: one that the conversation lacks can mark places
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        backend: the tokenizers library's object.
        settings: the contents of ``tokenizer_config.json``.
        chat_template: Jinja source, where the checkpoint has one.
        eos_token_ids: tokens that end a sequence, besides the settings' own.

    Attributes:
        eos_token_ids: all tokens that end a sequence.
        bos_token_id: the token that begins one, or ``None``.
        generation_defaults: sampling parameters the authors recommend, from ``generation_config.json``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        settings = settings or {}
        self._backend = backend
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch on the shared backend
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        names = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None}
        self.bos_token_id: int | None = backend.token_to_id(names["bos_token"]) if "bos_token" in names else None
        eos = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if eos is None else {eos})
        self.generation_defaults: dict[str, float] = {}
        self._add_bos = bool(settings.get("add_bos_token")) and self.bos_token_id is not None
        self._template = None if chat_template is None else ChatTemplate(chat_template, names)
        self._special_id = {self._added[i].content: i for i in self.special_ids}
        specials = sorted(self._special_id, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._bytes = _TokenBytes(backend, frozenset(self._added))

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, vocab_size: int | None = None, eos_token_ids: Iterable[int] = ()
    ) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` and ``generation_config.json``.

        Args:
            folder: a checkpoint's folder; only ``tokenizer.json`` must be there.
            vocab_size: rows of the model's embedding, to check the tokenizer against.
            eos_token_ids: from the model's ``config.json``.

        Raises:
            TokenizerError: missing, malformed, or with token ids that the model does not have.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{path} does not exist", "Axon reads tokenizer.json (the fast tokenizer format) only."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} cannot be read: {error}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        eos = generation.get("eos_token_id")
        named = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(token, int) for token in named):
            raise TokenizerError(f"eos_token_id = {eos!r} in {folder / 'generation_config.json'} is no token id")
        eos_ids = {*eos_token_ids, *named}
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            try:
                template: str | None = template_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{template_file} cannot be read: {error}") from None
        else:
            template = _template_source(settings.get("chat_template"))
        tokenizer = cls(backend, settings=settings, chat_template=template, eos_token_ids=eos_ids)
        if generation.get("do_sample", True):
            wanted = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            tokenizer.generation_defaults = {
                name: value
                for name in wanted
                if isinstance(value := generation.get(name), int | float) and not isinstance(value, bool)
            }
        if vocab_size is not None:
            tokenizer.check_fits(vocab_size, path)
        return tokenizer

    def check_fits(self, vocab_size: int, source: str | Path = "the tokenizer") -> None:
        """Raise TokenizerError if some token has no row among ``vocab_size`` rows of embeddings."""
        largest = max([*self._backend.get_vocab(with_added_tokens=True).values(), *self.eos_token_ids], default=0)
        if largest >= vocab_size:
            raise TokenizerError(
                f"{source} has token ids up to {largest}, the model only {vocab_size} rows",
                "The tokenizer does not belong to this model.",
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` works."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string; lone surrogates are refused.
            special: begin as the checkpoint's authors do, usually with the BOS token.
            parse_special: read special tokens written in the text as such. Never for what a user typed.

        Raises:
            RequestError: the text cannot be UTF-8.
        """
        try:
            with self._lock:
                self._backend.encode_special_tokens = not parse_special
                ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("the text holds characters that UTF-8 cannot carry", code="invalid_text") from None
        if special and self._add_bos and ids[:1] != [self.bos_token_id] and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the checkpoint's template; for people to read, not to encode.

        Raises:
            TokenizerError: the checkpoint has no chat template, or it fails.
            RequestError: the template refuses the conversation.
        """
        if self._template is None:
            raise TokenizerError("this model has no chat template", "Use `axon generate`, or a chat (instruct) model.")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation. Special tokens come from the template alone, never from what messages say.

        Where a message holds the text of a special token, a private-use character is put inside it before the template
        sees it, so that it can be told from the template's own; it is taken out again before encoding.

        Args:
            messages: each with ``role`` and ``content``, as in OpenAI's interface.
            add_generation_prompt: end with what an answer begins with.

        Raises:
            TokenizerError: no chat template, or it fails.
            RequestError: the template refuses the conversation, or a text cannot be UTF-8.
        """
        pattern = self._special_pattern
        if pattern is None or not any(pattern.search(text) for text in _texts(messages)):
            text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
            return self.encode(text, special=False, parse_special=True)
        used = set("".join(_texts(messages)))
        mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        marked = _map_texts(messages, lambda text: _mark(text, pattern, mark))
        rendered = self.render_chat(marked, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        end = 0
        for match in pattern.finditer(rendered):
            ids += self._encode_plain(rendered[end : match.start()].replace(mark, ""))
            ids.append(self._special_id[match[0]])
            end = match.end()
        return ids + self._encode_plain(rendered[end:].replace(mark, ""))

    def _encode_plain(self, text: str) -> list[int]:
        return self.encode(text, special=False) if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, without its special tokens; malformed bytes become U+FFFD."""
        stream = StreamDecoder(self, continuation=False)
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for inside a text; none for special tokens."""
        return b"" if token in self.special_ids else self._bytes[token]

    @property
    def strips_first_space(self) -> bool:
        """Whether a whole text begins with a space of the tokenizer's making (SentencePiece)."""
        return self._bytes.strips_first_space


class StreamDecoder:
    """Tokens in, text out, one token at a time, never half a character.

    Tokens cut text anywhere, also between the bytes of one character. The bytes of an unfinished character wait here
    until the rest has come. Constant work per token.

    Args:
        tokenizer: whose tokens.
        continuation: the tokens go on after a prompt, so a leading space is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space and not continuation

    def push(self, token: int) -> str:
        """Take the next token and return the text that is certain now; may be empty."""
        data = self._tokenizer.token_bytes(token)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the text: an unfinished character comes out as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class _TokenBytes:
    """Token id → bytes, for the two ways in which decoder models' tokenizers write bytes into token names."""

    def __init__(self, backend: tokenizers.Tokenizer, added: frozenset[int]) -> None:
        self._backend, self._added = backend, added
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
        if name is None:  # a row of the embedding that the tokenizer has no name for
            return f"⟨{token}⟩".encode()
        if token in self._added:
            return name.encode()
        if self._byte_level:
            codes = [_BYTE_OF_CHARACTER.get(character) for character in name]
            return name.encode() if None in codes else bytes(code for code in codes if code is not None)
        if byte := _BYTE_TOKEN.match(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character; those that are not printable come after U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def byte_backend() -> tokenizers.Tokenizer:
    """A tokenizer of the 256 bytes, as the ``tokenizers`` library has it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(_BYTE_OF_CHARACTER), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of the 256 bytes, for random-weight models that have none of their own."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    return Tokenizer(byte_backend(), chat_template=template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(contents, dict):
        raise TokenizerError(f"{path} holds a {type(contents).__name__}, not an object")
    return contents


def _template_source(value: Any) -> str | None:
    """One template, or of several named ones the one named ``default``."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _texts(value: Any) -> Iterable[str]:
    """Every string inside nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_texts(item, change) for item in value]
    return value


def _mark(text: str, pattern: re.Pattern[str], mark: str) -> str:
    """Put ``mark`` after the first character of everything that looks like a special token."""
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text
