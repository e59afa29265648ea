"""The next token of an answer, from the model's scores: penalties, what may come, temperature, and what is too unlikely.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from finery.engines.base import Ask, Token


class Chooser:
    """Chooses the tokens of one answer, with dice of its own: other answers at the same time do not change it."""

    def __init__(self, ask: Ask, device: torch.device) -> None:
        self.ask = ask
        self.options = ask.options
        self.counts: Counter[int] = Counter()  # tokens of the answer
        self.dice: torch.Generator | None = None
        if not self.options.greedy:
            seed = ask.seed if ask.seed is not None else int(torch.randint(2**62, ()))
            self.dice = torch.Generator(device).manual_seed(seed & (2**63 - 1))
        self._prompt: Tensor | None = None
        if self.options.repetition_penalty != 1:
            self._prompt = torch.tensor(sorted(set(ask.prompt_ids)), dtype=torch.long, device=device)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        o, ask = self.options, self.ask
        penalised = o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty
        return o.greedy and not penalised and ask.constraint is None and ask.num_logprobs is None

    def choose(self, scores_V: Tensor) -> Token:
        """A token; `scores_V` are fp32 and may be written into. What is told of likelihoods is what the model itself gave."""
        told = torch.log_softmax(scores_V, -1) if self.ask.num_logprobs is not None else None
        self._penalise(scores_V)
        constraint = self.ask.constraint
        if constraint is not None and (ids := constraint.allowed()) is not None:
            allowed = torch.as_tensor(ids, dtype=torch.long, device=scores_V.device)
            kept = scores_V[allowed]
            scores_V.fill_(-torch.inf)[allowed] = kept
        token = int(scores_V.argmax()) if self.options.greedy else self._draw(scores_V)
        self.counts[token] += 1
        if constraint is not None:
            constraint.take(token)
        return self._token(token, told)

    def take(self, token: int) -> Token:
        """The token was chosen elsewhere, as it is where the choice is plain."""
        self.counts[token] += 1
        return Token(token)

    def _penalise(self, scores_V: Tensor) -> None:
        """Repetition as in CTRL (Keskar et al., 2019, arXiv 1909.05858), presence and frequency as OpenAI's API tells them."""
        o = self.options
        answer = torch.tensor(list(self.counts), dtype=torch.long, device=scores_V.device)
        if self._prompt is not None:
            ids = torch.cat([self._prompt, answer]).unique()
            known = scores_V[ids]
            scores_V[ids] = torch.where(known > 0, known / o.repetition_penalty, known * o.repetition_penalty)
        if (o.presence_penalty or o.frequency_penalty) and self.counts:
            numbers = torch.tensor(list(self.counts.values()), dtype=torch.float32, device=scores_V.device)
            scores_V[answer] -= o.presence_penalty + o.frequency_penalty * numbers

    def _draw(self, scores_V: Tensor) -> int:
        o = self.options
        scores = scores_V / o.temperature
        if 0 < o.top_k < len(scores):
            scores, ids = scores.topk(o.top_k)
        else:
            scores, ids = scores.sort(descending=True) if o.top_p < 1 or o.min_p > 0 else (scores, None)
        probs = torch.softmax(scores, -1)
        if ids is not None:  # likeliest first
            kept = (probs.cumsum(-1) - probs < o.top_p) & (probs >= o.min_p * probs[0])
            kept[0] = True
            probs = torch.where(kept, probs, 0.0)
        drawn = int(torch.multinomial(probs, 1, generator=self.dice))
        return drawn if ids is None else int(ids[drawn])

    def _token(self, token: int, told: Any) -> Token:
        if told is None:
            return Token(token)
        count = self.ask.num_logprobs or 0
        values, ids = told.topk(min(count, len(told))) if count else (torch.empty(0), torch.empty(0))
        return Token(token, float(told[token]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)))
