"""The text side of a model: tokenizer, chat template, end-of-sequence ids.

It is read from the checkpoint's tokenizer.json, tokenizer_config.json and chat_template.jinja alone; no code of a
checkpoint is ever run, and templates render in the library's sandbox. A folder without a tokenizer serves token ids.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from moesaic.errors import CheckpointError, InvalidArgument, Unsupported
from router.detokenizer import Detokenizer
from router.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_MAX_TEMPLATE_MESSAGE_CHARS = 200
# Names that a template's variables may not have: they would steer the rendering itself, up to another template.
_RESERVED_VARIABLES = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}


class Text:
    """Text to token ids and back. Without a tokenizer, tokens spell nothing and the rest is Unsupported."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary | None = None
        self._chat_template: str | None = None
        if tokenizer is not None:
            # A folder may ask for both; a server neither cuts nor pads what it was given.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            self._vocabulary = Vocabulary(tokenizer.backend_tokenizer)
            self._chat_template = _default_template(tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text. Thread-safe; takes time in proportion to the text. Raises Unsupported."""
        if self._tokenizer is None:
            raise _no_tokenizer()
        # The backend itself: it is immutable, where the wrapper sets truncation on every call.
        return tuple(
            self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        )

    def least_tokens(self, text: str) -> int:
        """A lower bound of how many tokens `text` has, known at once. Raises Unsupported."""
        if self._vocabulary is None:
            raise _no_tokenizer()
        return -(-len(text.encode()) // self._vocabulary.longest_token_bytes)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all tokens together; what the pieces of a detokenizer join to."""
        detokenizer = self.detokenizer((), skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for what follows `prompt`."""
        if self._vocabulary is None:
            return Detokenizer(lambda _: b"", prompt, drop_leading_space=False)
        vocabulary = self._vocabulary
        return Detokenizer(
            vocabulary.visible_bytes_of if skip_special_tokens else vocabulary.bytes_of,
            prompt,
            drop_leading_space=vocabulary.adds_leading_space,
        )

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling, such as "▁Hello"; empty for an id that it does not hold."""
        return "" if self._vocabulary is None else self._vocabulary.token(token_id)

    def spell(self, token_id: int) -> tuple[str, bytes]:
        """One token as text, with U+FFFD where it holds part of a character, and as bytes."""
        spelled = b"" if self._vocabulary is None else self._vocabulary.bytes_of(token_id)
        return spelled.decode(errors="replace"), spelled

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation through the checkpoint's own template, special tokens included. Thread-safe.

        Raises Unsupported without a template, InvalidArgument when the template refuses the messages.
        """
        if self._tokenizer is None or self._chat_template is None:
            raise Unsupported("messages: this model has no chat template", field="messages")
        _check_variables(variables)
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except TemplateSyntaxError as error:
            raise CheckpointError("the model's chat template is not valid", field="chat_template") from error
        except Exception as error:  # a template is a program: whatever it runs into is this request's error
            raise InvalidArgument(f"messages: {_template_message(error)}", field="messages") from error
        return str(rendered)


def load_text(folder: str | Path) -> Text:
    """The text side of a checkpoint folder.

    Raises CheckpointError when tokenizer.json or an end-of-sequence id is there and not usable.
    """
    folder = Path(folder)
    tokenizer = _load_tokenizer(folder)
    eos_token_ids = _eos_token_ids(folder)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos_token_ids |= {tokenizer.eos_token_id}
    return Text(tokenizer, eos_token_ids)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    if not (folder / "tokenizer.json").is_file():
        log.warning("the model folder has no tokenizer.json: prompts are token ids only")
        return None
    try:
        # Named, not looked up by the folder's config: this class reads tokenizer.json as it is, and no code.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # the library raises bare exceptions for a file that it cannot read
        raise CheckpointError("tokenizer.json cannot be read", field="tokenizer.json") from error


def _eos_token_ids(folder: Path) -> frozenset[int]:
    """generation_config.json decides; without an entry there, config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{name} is not a JSON object", field=name) from error
        if found is not None:
            return _checked_ids(found, name)
    return frozenset()


def _checked_ids(found: object, name: str) -> frozenset[int]:
    token_ids = found if isinstance(found, list) else [found]
    if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
        message = f"{name}: eos_token_id must be a token id or a list of token ids"
        raise CheckpointError(message, field="eos_token_id")
    return frozenset(token_ids)


def _default_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A folder may hold several templates by name."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_variables(variables: Mapping[str, Any]) -> None:
    reserved = _RESERVED_VARIABLES & variables.keys()
    if reserved:
        message = f"chat_template_kwargs: {min(reserved)} cannot be set"
        raise InvalidArgument(message, field="chat_template_kwargs")


def _template_message(error: Exception) -> str:
    if isinstance(error, TemplateError) and error.message:
        return error.message[:_MAX_TEMPLATE_MESSAGE_CHARS]
    return "this model's chat template cannot render them"


def _no_tokenizer() -> Unsupported:
    return Unsupported("prompt: this model has no tokenizer, send token ids", field="prompt")
