"""The model itself, through transformers' generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finery.engines.base import Engine, GenerationOptions

__all__ = ["HuggingFace"]


class HuggingFace(Engine):
    """Generates with a model in this process."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], options: Any) -> None:
        from transformers import GenerationConfig

        self.model = model.eval()
        self.model.generation_config = GenerationConfig()  # only the run's own keys count, not what came with the model
        self.tokenizer = tokenizer
        self.stop_ids = sorted(stop_ids)

    def stream(self, prompt_ids: list[int], options: GenerationOptions) -> Iterator[str]:
        """Tokens are made in a thread; leaving the iterator tells it to stop and waits for it."""
        from threading import Event, Thread

        from transformers import StoppingCriteriaList, TextIteratorStreamer

        leave = Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=options.skip_special_tokens)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._generate(prompt_ids, options, streamer, StoppingCriteriaList([lambda *_: leave.is_set()]))
            except BaseException as error:  # told to the reader below, in its own thread
                failures.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            leave.set()
            thread.join()
        if failures:
            raise failures[0]

    def _generate(self, prompt_ids: list[int], options: GenerationOptions, streamer: Any, stopping: Any) -> None:
        import torch

        drawn = {} if options.greedy else {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
        with torch.no_grad():  # quanto takes views of packed weights, which it cannot in inference mode
            ids = torch.tensor([prompt_ids], device=self.model.device)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config(options, drawn),
                streamer=streamer,
                stopping_criteria=stopping,
            )

    def _config(self, options: GenerationOptions, drawn: dict[str, Any]) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=not options.greedy,
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else next(iter(self.stop_ids), None),
            **drawn,
        )
