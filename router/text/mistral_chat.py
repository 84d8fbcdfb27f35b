"""Mistral's own chat format for folders without a template, in the version that the tokenizer's file states.

Mistral's library encodes the conversation. It comes with the extra `mistral` and imported only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.checkpoints.mistral_params import PARAMS_FILE
from moesaic.errors import InvalidArgument
from router.text.chat_template import TEMPLATE_FILE
from router.text.mistral_tokenizer import SENTENCEPIECE_FILE
from router.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

_MAX_MESSAGE_CHARS = 200
_OPENS_TURN = "[INST]"
_ROLES = ("system", "user", "assistant")


def find_mistral_chat(path: Path, tokenizer: TextTokenizer) -> MistralChat | str:
    """The chat format of a tokenizer's file, or for people why there is none, to follow "no chat template".

    A plain tokenizer.model states no version. It is taken to be the first version only in a folder in
    Mistral's own layout, and only if it lacks the control tokens of all later versions.
    """
    if path.name == SENTENCEPIECE_FILE:
        if not (path.parent / PARAMS_FILE).is_file():
            return f"add {TEMPLATE_FILE} to the folder"
        if tokenizer.backend.token_to_id(_OPENS_TURN) is not None:
            return f"the name of {path.name} does not say its version, as {path.name}.v3 does"
    try:
        return MistralChat(path)
    except ImportError:
        return "Mistral's own chat format needs mistral-common (from a checkout: pip install ./moesaic '.[mistral]')"
    except UnknownVersion:
        return f"mistral-common does not know this version of {path.name}"


class UnknownVersion(Exception):
    """Mistral's library knows no chat format for a tokenizer's file."""


class MistralChat:
    """Encodes conversations. Raises UnknownVersion, and ImportError where the extra is not installed."""

    def __init__(self, path: Path) -> None:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._errors: tuple[type[Exception], ...] = (MistralCommonException, ValueError)
        try:
            self._tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.from_file(path)
        except ImportError:
            raise
        except Exception as error:  # the library raises errors of any kind, assertions among them
            raise UnknownVersion(path.name) from error

    @property
    def version(self) -> str:
        return str(self._tokenizer.version.value)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, continue_final_message: bool
    ) -> tuple[int, ...]:
        """The token ids of a conversation, including the one that begins a text. Raises InvalidArgument.

        The text of messages never becomes control tokens. The format opens the assistant's turn by ending
        that of the user, so there is no generation prompt that could be left out.
        """
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        for message in messages:
            if message["role"] not in _ROLES:
                raise InvalidArgument(f"messages: role must be one of: {', '.join(_ROLES)}", field="messages")
        talk = [{"role": message["role"], "content": message["content"]} for message in messages]
        if continue_final_message:
            if talk[-1]["role"] != "assistant":
                raise InvalidArgument(
                    "continue_final_message: the final message must be the assistant's",
                    field="continue_final_message",
                )
            talk[-1]["prefix"] = True
        try:
            request: Any = ChatCompletionRequest(messages=talk)
            return tuple(self._tokenizer.encode_chat_completion(request).tokens)
        except self._errors as error:
            reason = str(error).partition("\n")[0][:_MAX_MESSAGE_CHARS]
            raise InvalidArgument(f"messages: {reason}", field="messages") from error
