"""The keys of answers that a run writes to what it is evaluated on, once its model is there."""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from finery.compat import have, install_of
from finery.data.load import DataOptions
from finery.options import Finding, OptionGroup

_METRIC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PredictionOptions(OptionGroup):
    do_predict: bool = False
    """Predict the evaluation sets after training, or alone with a trained model: predict_results.json."""
    predict_with_generate: bool = False
    """do_predict writes an answer to each prompt into generated_predictions.jsonl and scores them (BLEU-4, ROUGE), and do_eval tells these
    scores, too; otherwise both measure the loss. Answers are drawn as chat draws them (temperature, max_new_tokens, …)."""
    predict_metric: str | None = None
    """A function of your own that scores answers: `module:function`, in a file of the folder where the run is started. It gets the answers
    and what the data have in their place, two lists of texts, and returns numbers by name."""
    generation_max_length: int | None = Field(None, gt=1)
    """The most tokens of a prompt and its answer together, in predictions; max_new_tokens holds as well."""
    generation_num_beams: int | None = Field(None, gt=0)
    """Beams are not searched: 1 is all that it may say."""
    eval_num_beams: int | None = Field(None, gt=0)
    """The same."""

    @property
    def measures(self) -> bool:
        """Whether predicting is measuring the loss."""
        return self.do_predict and not self.predict_with_generate

    @property
    def generates(self) -> bool:
        """Whether answers are written."""
        return self.predict_with_generate and (self.do_predict or bool(getattr(self, "do_eval", False)))

    def measured(self, data: DataOptions) -> DataOptions:
        """What a session reads: sets that are only to be answered may come without answers, so they are not measured."""
        loop: Any = self
        only_answered = self.generates and not loop.do_eval and loop.eval_strategy == "no"
        return data.model_copy(update={"eval_dataset": ()}) if only_answered else data

    def check_predictions(self, run: Any) -> Iterator[Finding]:
        """What answers need: a method that has answers, something to answer, and what scores them."""
        for key in ("generation_num_beams", "eval_num_beams"):
            if (beams := getattr(self, key)) is not None and beams > 1:
                yield Finding(
                    key, f"should be 1: answers are drawn, or with 'do_sample: false' the likeliest taken, not searched; found {beams}"
                )
        if self.do_predict and not (run.data.val_size or run.data.eval_dataset):
            yield Finding("do_predict", "needs something to predict: set 'val_size' or 'eval_dataset'")
        if self.do_predict and run.loop.output_dir is None and not (run.loop.do_train or run.loop.do_eval):
            yield Finding("do_predict", "needs 'output_dir': the folder for everything that the run writes")
        if self.predict_with_generate and run.method.rows != "chat":
            yield Finding("predict_with_generate", "belongs to supervised training; this stage has no answers")
        elif self.predict_with_generate and not self.generates:
            yield Finding("predict_with_generate", "has no effect without 'do_predict' or 'do_eval'", fatal=False)
        elif self.generates and self.predict_metric is None and not have("jieba"):
            advice = f"{install_of('jieba')}; or give a 'predict_metric'"
            yield Finding("predict_with_generate", f"scores answers with the package jieba, which is not installed: {advice}")
        yield from self._check_metric_of_own()

    def _check_metric_of_own(self) -> Iterator[Finding]:
        if self.predict_metric is None:
            return
        if not self.generates:
            yield Finding("predict_metric", "scores answers, which 'predict_with_generate' writes with 'do_predict' or 'do_eval'")
        elif not _METRIC.fullmatch(self.predict_metric):
            yield Finding("predict_metric", f"should be 'module:function', found {self.predict_metric!r}")
        elif not _is_there(self.predict_metric.partition(":")[0].partition(".")[0]):
            yield Finding("predict_metric", f"should name a module in {Path.cwd()} or an installed one, found {self.predict_metric!r}")


def _is_there(module: str) -> bool:
    """Whether a module lies in the working directory or is installed; nothing of it is run."""
    here = Path.cwd()
    if (here / f"{module}.py").is_file() or (here / module).is_dir() or module in sys.modules:
        return True
    return find_spec(module) is not None
