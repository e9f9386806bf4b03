"""Conversations: records with `messages`, formatted by the tokenizer's chat template. Only what the assistant says is a target.

Between reading and tokenising, a conversation is JSON text, so that it is held out, sampled and cached like any other document.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
# Each turn is a line with the role, the content, and the token that ends a text, so that `generate` and servers stop at the end of an
# answer, and no token has to be added to a tokenizer. The content is stripped, so that its first token is the same after a prompt and in
# training.
CHAT_TEMPLATE = (
    "{{ bos_token or eos_token }}{% for message in messages %}{{ message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


def conversation_text(messages: Any, where: str) -> str:
    """The messages of a record as JSON text.

    Args:
        messages: the messages of the record.
        where: the place of the record, for error messages.

    Raises:
        ValueError: this is not a list of messages with a role and a content, or none is the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list that is not empty, got {_shown(messages)}")
    kept = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(
                f"{where}: expected messages with a role, one of {', '.join(ROLES)}; got {_shown(message)}"
            )
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"{where}: the content of a message must be a string, got {_shown(message.get('content'))}"
            )
        kept.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in kept):
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn; leave the record out")
    return json.dumps(kept, ensure_ascii=False)


def said(text: str, *, roles: Sequence[str] = ROLES) -> str:
    """The contents of these roles' messages in a conversation, without the template."""
    return "\n".join(message["content"].strip() for message in json.loads(text) if message["role"] in roles)


def set_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives a tokenizer `CHAT_TEMPLATE` if it has none. `save_pretrained` writes it with the tokenizer.

    Raises:
        ValueError: the tokenizer's own template does not mark the assistant's part.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    elif "generation %}" not in str(tokenizer.chat_template):
        raise ValueError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} does not mark what the assistant says: put it between "
            "{% generation %} and {% endgeneration %}, or remove chat_template for this package's own"
        )


def tokenize_conversations(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Each conversation as (2, tokens) int32: token ids, and 1 where the assistant speaks.

    Args:
        texts: texts from `conversation_text`.
        tokenizer: a tokenizer with a chat template.
    """
    documents = []
    for text in texts:
        encoded = tokenizer.apply_chat_template(json.loads(text), return_dict=True, return_assistant_tokens_mask=True)
        documents.append(np.array([encoded["input_ids"], encoded["assistant_masks"]], dtype=np.int32))
    return documents


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
