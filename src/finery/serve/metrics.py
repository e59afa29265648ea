"""Figures of a server in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """How often a time fell into each span."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """A time that was measured."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        total = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts since the server has started."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cancelled = 0
        self.request_seconds = Histogram()
        self.first_token_seconds = Histogram()

    def text(self, running: int, waiting: int) -> str:
        """All of it, with how many answers are written and wait now."""
        lines = [*_head("finery_requests_total", "counter", "Requests that were answered, by path and status.")]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'finery_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, told, value in (
            ("finery_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("finery_completion_tokens_total", "counter", "Tokens of answers.", self.completion_tokens),
            ("finery_cancelled_total", "counter", "Answers whose reader left, or that took too long.", self.cancelled),
            ("finery_answers_running", "gauge", "Answers that the engine has.", running),
            ("finery_answers_waiting", "gauge", "Answers that wait for MAX_CONCURRENT.", waiting),
        ):
            lines += [*_head(name, kind, told), f"{name} {value}"]
        for name, told, histogram in (
            ("finery_request_seconds", "From a request to the end of its answer.", self.request_seconds),
            ("finery_first_token_seconds", "From a request to the first token of its answer.", self.first_token_seconds),
        ):
            lines += [*_head(name, "histogram", told), *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"
