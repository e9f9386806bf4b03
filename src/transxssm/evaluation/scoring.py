"""Loss and rank of single tokens under any causal language model, without all logits of a long text at once.

Letters: b batch, t tokens, n tokens that are scored, v vocabulary, d hidden size.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transxssm.data.packing import IGNORED_LABEL

logger = logging.getLogger(__name__)

BLOCK_LOGITS = 2**24  # logits that exist at once
PROBE_TOKENS = 8


class TokenScores(NamedTuple):
    """A model's scores of the requested tokens, row by row.

    Args:
        losses: (n,) −log p in nats, float32 (float64 for a float64 model).
        hits: (n,) bool, whether the token is the likeliest of all.
    """

    losses: Tensor
    hits: Tensor


class TokenScorer:
    """Scores tokens with one model.

    Most models are a decoder and a linear head, and logits are computed from the hidden states in blocks, for scored tokens only. A probe
    finds a model that changes its logits further (soft caps, scales). It computes them itself, which the log says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: any causal language model, in evaluation mode.
        """
        self.model = model
        self.vocab_size = model.config.get_text_config().vocab_size
        self._has_plain_head = self._probe()
        if not self._has_plain_head:
            logger.warning("%s: more than a linear head makes its logits; all of them are kept", type(model).__name__)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, targets: Tensor) -> TokenScores:
        """Scores the targets that are not −100.

        Args:
            input_ids: (b, t) token ids, without padding.
            targets: (b, t) the token to be predicted from input tokens 0 to i at each position i, or −100 for none.

        Raises:
            ValueError: a token id is outside the vocabulary, or there are more tokens than the model has positions.
        """
        outside = int(max(input_ids.max(), targets.max()))
        if outside >= self.vocab_size:
            raise ValueError(
                f"token ids must lie in the model's vocabulary, 0 … {self.vocab_size - 1}: got {outside}; use the tokenizer "
                "or the vocabulary size that the model was trained with"
            )
        input_ids, targets = input_ids.to(self.model.device), targets.to(self.model.device)
        counted = targets != IGNORED_LABEL
        states = self._states(input_ids)[counted]  # (n, d), or (n, v) if the model computes its logits itself
        rows = max(1, BLOCK_LOGITS // self.vocab_size)
        parts = [
            self._score(states_block, targets_block)
            for states_block, targets_block in zip(states.split(rows), targets[counted].split(rows), strict=True)
        ]
        losses, hits = (torch.cat(column) for column in zip(*parts, strict=True))
        return TokenScores(losses, hits)

    def _states(self, input_ids: Tensor) -> Tensor:
        try:
            if self._has_plain_head:
                return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return self.model(input_ids=input_ids, use_cache=False).logits
        except IndexError as error:  # more tokens than learned positions
            raise ValueError(
                f"the model cannot read {input_ids.shape[1]} tokens at once ({error}); choose shorter lengths"
            ) from error

    def _score(self, states: Tensor, targets: Tensor) -> TokenScores:
        logits = self.model.get_output_embeddings()(states) if self._has_plain_head else states
        logits = logits if logits.dtype == torch.float64 else logits.float()
        own = logits.gather(1, targets[:, None]).squeeze(1)
        return TokenScores(logits.logsumexp(1) - own, logits.argmax(1) == targets)

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether decoder and head alone reproduce the model's logits."""
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return False
        input_ids = torch.arange(1, 1 + PROBE_TOKENS, device=self.model.device)[None] % self.vocab_size
        states = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return head(states).shape == logits.shape and torch.allclose(head(states), logits, rtol=1e-4, atol=1e-5)
