"""Mistral's own chat format, for folders that have no template: in the version that the tokenizer's file says.

The library of Mistral encodes the conversation; it is an extra (moesaic[mistral]) and imported only here.
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
    """The format of a tokenizer's file, or why there is none: for a person, to be read after "there is no template".

    A plain tokenizer.model says no version. It is the first one in a folder of Mistral's own making, and only if it
    lacks the control tokens of all others.
    """
    if path.name == SENTENCEPIECE_FILE:
        if not (path.parent / PARAMS_FILE).is_file():
            return f"add {TEMPLATE_FILE} to the folder"
        if tokenizer.backend.token_to_id(_OPENS_TURN) is not None:
            return f"the name of {path.name} does not say its version, as {path.name}.v3 does"
    try:
        return MistralChat(path)
    except ImportError:
        return "Mistral's own chat format needs moesaic[mistral]"
    except UnknownVersion:
        return f"mistral-common does not know this version of {path.name}"


class UnknownVersion(Exception):
    """The library cannot make a chat format of a tokenizer's file."""


class MistralChat:
    """Conversations to token ids. Raises ImportError where the extra is not installed, UnknownVersion."""

    def __init__(self, path: Path) -> None:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._errors: tuple[type[Exception], ...] = (MistralCommonException, ValueError)
        try:
            self._tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.from_file(path)
        except ImportError:
            raise
        except Exception as error:  # the library raises whatever it runs into, assertions among them
            raise UnknownVersion(path.name) from error

    @property
    def version(self) -> str:
        return str(self._tokenizer.version.value)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, continue_final_message: bool
    ) -> tuple[int, ...]:
        """Token ids, the first one included. What messages spell never becomes a control token. Raises InvalidArgument.

        The format opens the assistant's turn by ending that of the user, so there is no generation prompt to leave out.
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
