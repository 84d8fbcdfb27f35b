"""The text side of a model: tokenizer, chat format, end-of-sequence ids.

It is read from these files of a checkpoint alone: tokenizer.json, tekken.json or a SentencePiece
tokenizer.model, tokenizer_config.json, and the chat template. No code of a checkpoint is ever run. A folder
without a tokenizer can be served with token ids.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from moesaic.errors import InvalidArgument, Unsupported
from router.text.chat_template import TOKENIZER_CONFIG_FILE, ChatTemplate, find_template
from router.text.control_tokens import ControlTokens
from router.text.detokenizer import Detokenizer
from router.text.eos_tokens import read_eos_token_ids, read_object
from router.text.hf_tokenizer import TOKENIZER_FILE, read_hf_tokenizer
from router.text.length_bound import bytes_per_token
from router.text.mistral_chat import MistralChat, find_mistral_chat
from router.text.mistral_tokenizer import find_mistral_file, read_mistral_tokenizer
from router.text.tokenizer import TextTokenizer
from router.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Names that template variables may not have: they would control the rendering, up to the template.
_RESERVED_VARIABLES = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}
_NO_TEMPLATE = "this model has no chat template"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as one text, control tokens included. `encode` makes the token ids, in time in proportion to
    the text. They may differ from the ids of the text, because messages never become control tokens.
    """

    text: str
    encode: Callable[[], tuple[int, ...]]


class Text:
    """Text to token ids and back. Without a tokenizer, tokens spell nothing and all else is Unsupported.

    `no_chat` says why there is no chat format, where there is none.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        eos_token_ids: frozenset[int],
        chat: ChatTemplate | MistralChat | None = None,
        *,
        no_chat: str = _NO_TEMPLATE,
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._chat = chat
        self._no_chat = no_chat
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer.backend)
        self._bytes_per_token = None if tokenizer is None else bytes_per_token(tokenizer.backend)
        self._control_tokens = None if tokenizer is None else ControlTokens(tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations are supported."""
        return self._tokenizer is not None and self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The token ids of a text. Thread-safe. Takes time in proportion to the text. Raises Unsupported."""
        if self._tokenizer is None:
            raise _no_tokenizer()
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without tokenizing it; 0 where only tokenizing tells.

        Raises Unsupported.
        """
        if self._tokenizer is None:
            raise _no_tokenizer()
        return 0 if self._bytes_per_token is None else -(-len(text.encode()) // self._bytes_per_token)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all tokens, equal to the joined pieces of a detokenizer."""
        detokenizer = self.detokenizer((), skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for the tokens that follow `prompt`."""
        if self._vocabulary is None:
            return Detokenizer(lambda _: b"", prompt, drop_leading_space=False)
        vocabulary = self._vocabulary
        return Detokenizer(
            vocabulary.visible_bytes_of if skip_special_tokens else vocabulary.bytes_of,
            prompt,
            drop_leading_space=vocabulary.adds_leading_space,
        )

    def token(self, token_id: int) -> str:
        """A token in the vocabulary's spelling, such as "▁Hello"; empty for an id that it does not hold."""
        return "" if self._vocabulary is None else self._vocabulary.token(token_id)

    def spell(self, token_id: int) -> tuple[str, bytes]:
        """A token as text, with U+FFFD where it holds part of a character, and as bytes."""
        spelled = b"" if self._vocabulary is None else self._vocabulary.bytes_of(token_id)
        return spelled.decode(errors="replace"), spelled

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> Conversation:
        """A conversation in the checkpoint's own chat format. Thread-safe.

        Raises Unsupported without a chat format, InvalidArgument if it refuses the messages.
        """
        control = self._control_tokens
        if control is None or self._chat is None:
            raise Unsupported(f"messages: {self._no_chat}", field="messages")
        _check_variables(variables)
        if isinstance(self._chat, MistralChat):
            if variables:
                message = f"chat_template_kwargs: {_NO_TEMPLATE}, so it has no variables"
                raise InvalidArgument(message, field="chat_template_kwargs")
            token_ids = self._chat.encode(messages, continue_final_message=continue_final_message)
            return Conversation(self.decode(token_ids, skip_special_tokens=False), lambda: token_ids)
        rendered = self._chat.render(
            control.mark(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=control.mark(variables),
        )
        return Conversation(control.unmarked(rendered), lambda: control.encode(rendered))


def load_text(folder: str | Path) -> Text:
    """The text side of a checkpoint folder.

    Raises CheckpointError if a tokenizer, a template or an end-of-sequence id exists and cannot be used.
    """
    folder = Path(folder)
    config = read_object(folder / TOKENIZER_CONFIG_FILE)
    mistral_file = None if (folder / TOKENIZER_FILE).is_file() else find_mistral_file(folder)
    tokenizer = (
        _load_tokenizer(folder) if mistral_file is None else read_mistral_tokenizer(mistral_file, config)
    )
    eos_token_ids = read_eos_token_ids(folder)
    if tokenizer is None:
        return Text(None, eos_token_ids)
    if tokenizer.eos_token_id is not None:
        eos_token_ids |= {tokenizer.eos_token_id}
    template = find_template(folder, config)
    if template is not None:
        return Text(tokenizer, eos_token_ids, ChatTemplate(template, tokenizer.special_names))
    if mistral_file is None:
        return Text(tokenizer, eos_token_ids)
    found = find_mistral_chat(mistral_file, tokenizer)
    if isinstance(found, str):
        return Text(tokenizer, eos_token_ids, no_chat=f"{_NO_TEMPLATE}; {found}")
    fields = {"version": found.version}
    log.info("no chat template: conversations are in Mistral's own format", extra={"fields": fields})
    return Text(tokenizer, eos_token_ids, found)


def _load_tokenizer(folder: Path) -> TextTokenizer | None:
    return read_hf_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None


def _check_variables(variables: Mapping[str, Any]) -> None:
    reserved = _RESERVED_VARIABLES & variables.keys()
    if reserved:
        message = f"chat_template_kwargs: {min(reserved)} cannot be set"
        raise InvalidArgument(message, field="chat_template_kwargs")


def _no_tokenizer() -> Unsupported:
    return Unsupported("prompt: this model has no tokenizer, send token ids", field="prompt")
