"""Text to tokens and back: ``tokenizer.json`` by the tokenizers library, and a decoder that streams valid UTF-8.

What a user types is text and nothing else: if it holds ``<|im_end|>``, the model reads those ten characters and not the
token that ends a turn. Only the chat template can write special tokens, and others that mark places in it.

This file never imports torch: the session manager may use it.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from axon_llm.chat_template import ChatTemplate
from axon_llm.errors import RequestError, TokenizerError
from axon_llm.reserved_tokens import ReservedTokens, as_special, template_marks, without_tags
from axon_llm.token_bytes import BYTE_OF_CHARACTER, TokenBytes, nameless

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Characters without a meaning: those that a conversation lacks can stand for tokens.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        backend: the tokenizers library's object, which is changed and must not be shared.
        settings: the contents of ``tokenizer_config.json``.
        chat_template: Jinja source, where the checkpoint has one.
        eos_token_ids: tokens that end a sequence, besides the settings' own.
        show_nameless: let tokens that the tokenizer has no name for show as their ids.

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
        show_nameless: bool = False,
    ) -> None:
        settings = settings or {}
        self._backend = backend
        backend.no_truncation()  # files keep what was switched on for training
        backend.no_padding()
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
        # To the backend the template's marks are special from here on, so that it can read them as text; in an answer
        # they show.
        marks = template_marks(self._added, chat_template or "")
        backend.add_special_tokens(list(map(as_special, marks.values())))
        special = {i: self._added[i] for i in self.special_ids}
        self._reserved = ReservedTokens({**special, **marks})
        self._unsayable = ReservedTokens({**special, **without_tags(marks, self._added)})
        self._spaces = [part for part in _parts_of(backend.pre_tokenizer) if _begins_with_space(part)]
        self._bytes = TokenBytes(backend, frozenset(self._added), show_nameless=show_nameless)

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
        """Raise TokenizerError if a token that every text may need has no row among ``vocab_size`` rows of embeddings.

        An added token may lack one: of some published checkpoints the padding token does. In a prompt it is refused.
        """
        ends = self.eos_token_ids if self.bos_token_id is None else {*self.eos_token_ids, self.bos_token_id}
        largest = max([*self._backend.get_vocab(with_added_tokens=False).values(), *ends], default=0)
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
        ids = self._encode(text, special=special, parse_special=parse_special)
        if special and self._add_bos and ids[:1] != [self.bos_token_id] and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        return ids

    def _encode(self, text: str, *, special: bool, parse_special: bool, begins: bool = True) -> list[int]:
        """Token ids as the backend has them; ``begins`` says that nothing stands in front of the text."""
        try:
            with self._lock:
                self._backend.encode_special_tokens = not parse_special
                for part in self._spaces:
                    part.prepend_scheme = "first" if begins else "never"
                ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("the text holds characters that UTF-8 cannot carry", code="invalid_text") from None
        return ids

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """The text of a conversation by the checkpoint's template; for people to read, not to encode.

        Args:
            messages: as in ``encode_chat``, as are the others.
            add_generation_prompt: end with what an answer begins with.
            now: the time that the template is told.

        Raises:
            TokenizerError: the checkpoint has no chat template, or it fails.
            RequestError: the template refuses the conversation.
        """
        if self._template is None:
            raise TokenizerError("this model has no chat template", "Use `axon generate`, or a chat (instruct) model.")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, now=now)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, now: datetime | None = None
    ) -> list[int]:
        """Token ids of a conversation. Special tokens come from the template alone, never from what messages say.

        Where a message holds the text of one, a private-use character stands for it while the template is rendered, so
        that it can be told from the template's own. Tags that open and close, such as ``<think>``, are the assistant's
        to say, too: templates look for them in what it said.

        Args:
            messages: each with ``role`` and ``content``, as in OpenAI's interface.
            add_generation_prompt: end with what an answer begins with.
            now: the time that the template is told, for those that write a date; this machine's own when omitted.

        Raises:
            TokenizerError: no chat template, or it fails.
            RequestError: the template refuses the conversation, or a text cannot be UTF-8.
        """
        kept = [self._unsayable if message.get("role") == "assistant" else self._reserved for message in messages]
        said = {
            text
            for message, reserved in zip(messages, kept, strict=True)
            for part in _texts(message)
            for text in reserved.found_in(part)
        }
        if not said:
            text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, now=now)
            return self._encode(text, special=False, parse_special=True)
        used = set("".join(_texts(messages)))
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(sorted(said), free, strict=False))
        if len(stand_ins) < len(said):
            raise RequestError("the messages use up the private-use characters", code="invalid_text", param="messages")
        replaced = [
            _map_texts(message, lambda part, reserved=reserved: reserved.replaced(part, stand_ins))
            for message, reserved in zip(messages, kept, strict=True)
        ]
        rendered = self.render_chat(replaced, add_generation_prompt=add_generation_prompt, now=now)
        back = str.maketrans({character: text for text, character in stand_ins.items()})
        ids: list[int] = []
        for part, token in self._reserved.split(rendered):
            if part:
                ids += self._encode(part.translate(back), special=False, parse_special=False, begins=not ids)
            if token is not None:
                ids.append(token)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, without its special tokens; malformed bytes become U+FFFD."""
        stream = StreamDetokenizer(self, continuation=False)
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for inside a text; none for special tokens."""
        return b"" if token in self.special_ids else self._bytes[token]

    def token_text(self, token: int) -> str:
        """What to call a token: its text, with U+FFFD for parts of a character, or the name of a special token."""
        if token in self.special_ids:
            return self._added[token].content
        if self._backend.id_to_token(token) is None:
            return nameless(token)
        return self._bytes[token].decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        """The special token of this name; it adds nothing to a text, so nobody will find its name in one."""
        token: int | None = self._backend.token_to_id(text)
        return token if token in self.special_ids else None

    @property
    def strips_first_space(self) -> bool:
        """Whether a whole text begins with a space of the tokenizer's making (SentencePiece)."""
        return self._bytes.strips_first_space


class StreamDetokenizer:
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


def byte_backend() -> tokenizers.Tokenizer:
    """A tokenizer of the 256 bytes, as the ``tokenizers`` library has it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of the 256 bytes, for random-weight models that have none of their own, and far more tokens."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    return Tokenizer(byte_backend(), chat_template=template, show_nameless=True)


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


def _parts_of(step: Any) -> list[Any]:
    """A tokenizer's step, or those that it consists of."""
    many: Any = step  # the library's annotations do not say that one can be iterated over
    return list(many) if isinstance(step, tokenizers.pre_tokenizers.Sequence) else [step]


def _begins_with_space(step: Any) -> bool:
    """Puts a space in front of a text, and not of its parts."""
    return isinstance(step, tokenizers.pre_tokenizers.Metaspace) and step.prepend_scheme == "first"
