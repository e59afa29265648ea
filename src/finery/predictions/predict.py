"""The story of predictions: every sample of the evaluation sets is asked, answers are written as they come, then scored."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from finery.compat import have
from finery.data.content import Rate
from finery.data.load import load_rows, open_eval
from finery.data.template import Template
from finery.engines.base import Ask, Engine
from finery.errors import UserError
from finery.files import replace_text
from finery.log import get_logger, plural
from finery.predictions.answers import answered
from finery.predictions.metric import Metric
from finery.predictions.questions import Question, Questions
from finery.predictions.scores import NAMES, scores
from finery.training.preparation import prepare

log = get_logger(__name__)

FILE = "generated_predictions.jsonl"


def predict(run: Any, open_engine: Callable[[Any], tuple[Engine, Template]], metric: Metric | None) -> dict[str, float]:
    """Answer what a `finery.run.Run` is evaluated on; returns what was measured, which is written as well."""
    began = time.monotonic()
    engine, template = open_engine(run)
    scored: dict[str, float] = {}
    timed: dict[str, float] = {}
    try:
        rows = load_rows(run.method.rows, template, run.rows, run.packing)
        parts, sources = open_eval(run.data, prepare(run.loop, run.trainer, run.model.download, rows, run.method))
        timed["model_preparation_time"] = round(time.monotonic() - began, 4)
        longest = min(engine.longest, run.loop.generation_max_length or engine.longest)
        room = min(run.rows.cutoff_len, max(longest - run.generation.max_new_tokens, longest // 2))
        for name, part in parts.items():
            questions = Questions(part, sources, template, run.rows, room, run.generation.skip_special_tokens)
            own = name.removeprefix("eval").strip()
            path = run.folder / (f"{Path(FILE).stem}_{_as_file(own)}.jsonl" if own else FILE)
            started, before = time.monotonic(), f"{own}_" if own else ""
            answers, labels, num_tokens = _write_answers(run, engine, questions, (name, path, longest))
            scored |= {before + key: value for key, value in score(answers, labels, metric).items()}
            timed |= {before + key: value for key, value in _speed(time.monotonic() - started, len(answers), num_tokens).items()}
    finally:
        engine.close()
    return _save(run, scored, timed)


def _write_answers(run: Any, engine: Engine, questions: Questions, where: tuple[str, Path, int]) -> tuple[list[str], list[str | None], int]:
    """The answers to one set, their labels, and how many tokens were generated."""
    name, path, longest = where
    options, tokenizer = run.generation, questions.template.tokenizer

    def ask(question: Question) -> Ask:
        most = min(options.max_new_tokens, longest - len(question.prompt_ids))
        return Ask(question.prompt_ids, options.model_copy(update={"max_new_tokens": most}), seed=run.loop.seed + question.place)

    num_tokens = 0
    answers: list[str] = []
    labels: list[str | None] = []
    rate = Rate(f"answering {name}", "samples", len(questions))
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s: answers to %s go to %s, one by one", name, plural(len(questions), "sample"), path)
    with path.open("w", encoding="utf-8") as file:
        for answer in answered(engine, questions, ask):
            text, label = answer.text, answer.question.label
            prompt = tokenizer.decode(list(answer.question.prompt_ids), skip_special_tokens=False)
            line = {"prompt": prompt, "predict": text, "label": label or ""}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()  # what there is stays, however the run ends
            answers.append(text)
            labels.append(label)
            num_tokens += answer.num_tokens
            rate.add(1)
    rate.end()
    questions.tell(name)
    if not answers:
        raise UserError(f"no sample is left to predict in {name}: {'; '.join(list(questions.left_out)[:5])}")
    return answers, labels, num_tokens


def _speed(seconds: float, num_answers: int, num_tokens: int) -> dict[str, float]:
    """Of answering and scoring, which the figures of other programs hold as well."""
    found = {"runtime": seconds, "samples_per_second": num_answers / seconds, "tokens_per_second": num_tokens / seconds}
    return {"samples": num_answers} | {key: round(value, 4) for key, value in found.items()}


def score(answers: list[str], labels: list[str | None], metric: Metric | None) -> dict[str, float]:
    """Means over the answers whose sample has one of its own, and what the user's metric gives for all."""
    found: dict[str, float] = {}
    pairs = [(answer, label) for answer, label in zip(answers, labels, strict=True) if label is not None]
    if len(pairs) < len(answers):
        log.warning(
            "%s of %s came without an answer of their own: they have no score", len(answers) - len(pairs), plural(len(answers), "sample")
        )
    if pairs and (metric is None or have("jieba")):
        each = [scores(answer, label) for answer, label in pairs]
        found |= {name: round(float(np.mean([one[name] for one in each])), 4) for name in NAMES}
    if metric is not None:
        found |= metric(answers, [label or "" for label in labels])
    return found


def _as_file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._")


def _save(run: Any, scored: Mapping[str, float], timed: Mapping[str, float]) -> dict[str, float]:
    """predict_results.json; eval_results.json beside the loss, where evaluation was asked for; and all_results.json. Told as a table."""
    folder = run.folder
    everything: dict[str, float] = {}
    if run.loop.do_eval:
        own = {f"eval_{name}": value for name, value in scored.items()}
        _write(folder / "eval_results.json", _read(folder / "eval_results.json") | own)
        everything |= own
    if run.loop.do_predict:
        own = {f"predict_{name}": value for name, value in (*scored.items(), *timed.items())}
        _write(folder / "predict_results.json", own)
        everything |= own
    _write(folder / "all_results.json", _read(folder / "all_results.json") | everything)
    width = max(map(len, everything))
    log.info("%s", "\n".join(f"  {name:<{width}}  {value:>12,.4f}" for name, value in sorted(everything.items())))
    return everything


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _write(path: Path, found: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(found, indent=4, sort_keys=True) + "\n")
