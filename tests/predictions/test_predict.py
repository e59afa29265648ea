"""Predictions on the tiny model: files, their order, what is asked, what is measured."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finery
from finery.commands.chat import open_engine
from finery.data.sample import Message
from finery.errors import UserError
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
PREDICTS = {
    "do_train": False,
    "dataset": None,
    "eval_dataset": "sums",
    "do_predict": True,
    "predict_with_generate": True,
    "do_sample": False,
    "max_new_tokens": 8,
}
ENGLISH = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def needs_jieba() -> None:
    pytest.importorskip("jieba")


@pytest.fixture
def data(tmp_path: Path, data_dir: Path) -> Iterator[Callable[..., str]]:
    """Write a data set of these records; returns its path."""

    def write(*records: dict[str, Any], name: str = "rows") -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return str(path)

    yield write


def lines(folder: Path, name: str = "generated_predictions.jsonl") -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def results(folder: Path, split: str = "predict") -> dict[str, float]:
    return json.loads((folder / f"{split}_results.json").read_text(encoding="utf-8"))


def test_the_base_model_answers_in_the_order_of_the_data(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(**PREDICTS)
    folder = finery.train(given)
    found = lines(folder)
    assert [line["prompt"] for line in found] == [ENGLISH.format(f"What is {n} plus {n + 7}?") for n in range(24)]
    assert [line["label"] for line in found] == [f"{n} plus {n + 7} is {2 * n + 7}." + " I am sure." * (n % 3) for n in range(24)]
    assert set(found[0]) == {"prompt", "predict", "label"}
    measured = results(folder)
    names = {"bleu-4", "rouge-1", "rouge-2", "rouge-l", "runtime", "samples_per_second", "model_preparation_time"}
    assert {f"predict_{name}" for name in names} <= measured.keys()
    assert results(folder, "all") == measured
    assert "predict_rouge-l" in capsys.readouterr().err, "the table is told"
    assert not (folder / "eval_results.json").exists() and not (folder / "run.yaml").exists()


def test_together_as_alone(keys: Keys) -> None:
    given = keys(**PREDICTS)
    folder = finery.train(given)
    engine, template = open_engine(run := Run.from_dict(given))
    for line, number in zip(lines(folder), range(24), strict=True):
        ids = template.prompt_ids([Message("user", f"What is {number} plus {number + 7}?")])
        assert line["predict"] == engine.generate(ids, run.generation)
    engine.close()


def test_drawn_answers_are_the_same_again(keys: Keys, tmp_path: Path) -> None:
    drawn = PREDICTS | {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    one, again, other = (
        lines(finery.train(keys(**drawn, output_dir=str(tmp_path / name), seed=seed))) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again != other


def test_after_training_and_alone(keys: Keys) -> None:
    tuned = {"dataset": "sums", "learning_rate": 0.01, "max_steps": 12}
    folder = finery.train(keys(**PREDICTS | tuned | {"do_train": True}))
    after = lines(folder)
    assert (folder / "train_results.json").exists() and results(folder, "all").keys() > results(folder).keys()
    assert not (folder / "eval_results.json").exists(), "sets that are to be answered may have no answers"
    (folder / "generated_predictions.jsonl").unlink()
    finery.train(keys(**PREDICTS))
    assert lines(folder) == after
    elsewhere = keys(**PREDICTS, adapter_name_or_path=str(folder), output_dir=f"{folder}-named")
    assert lines(finery.train(elsewhere)) == after
    assert lines(finery.train(keys(**PREDICTS, output_dir=f"{folder}-base"))) != after


def test_evaluation_tells_the_scores_as_well(keys: Keys) -> None:
    folder = finery.train(keys(**PREDICTS | {"dataset": "sums", "val_size": 4, "eval_dataset": None, "do_eval": True}))
    assert len(lines(folder)) == 4
    measured = results(folder, "eval")
    assert measured["eval_bleu-4"] == results(folder)["predict_bleu-4"] and measured["eval_loss"] > 0
    assert {*measured, *results(folder)} == set(results(folder, "all"))


def test_what_is_asked(keys: Keys, data: Callable[..., str]) -> None:
    path = data(
        {"instruction": "你是谁？", "output": "我是一个很小的模型。"},
        {"instruction": "And now?", "output": "Now, too.", "history": [["Then?", "Then."]], "system": "Be brief."},
        {"instruction": "Nobody knows?"},
        {"output": "There is no question."},
    )
    folder = finery.train(keys(**PREDICTS | {"eval_dataset": path, "dataset_dir": None}))
    told = lines(folder)
    then = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThen?<|im_end|>\n<|im_start|>assistant\nThen.<|im_end|>\n"
    assert [(line["prompt"], line["label"]) for line in told] == [
        (ENGLISH.format("你是谁？"), "我是一个很小的模型。"),
        (then + ENGLISH.format("And now?"), "Now, too."),
        (ENGLISH.format("Nobody knows?"), ""),
    ]


def test_sets_each_by_itself(keys: Keys, data: Callable[..., str]) -> None:
    path = data({"instruction": "Hi", "output": "Hello"}, name="my rows")
    folder = finery.train(keys(**PREDICTS | {"eval_dataset": ["names", path], "eval_on_each_dataset": True, "max_samples": 2}))
    assert len(lines(folder, "generated_predictions_names.jsonl")) == 2
    (other,) = [file for file in folder.glob("generated_predictions_*.jsonl") if "names" not in file.name]
    assert len(lines(folder, other.name)) == 1 and " " not in other.name
    assert "predict_names_rouge-1" in results(folder)


def test_long_prompts(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    short = PREDICTS | {"eval_dataset": "names", "cutoff_len": 20}
    for line in lines(finery.train(keys(**short))):
        assert line["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n") and not line["prompt"].startswith("<|im_start|>user")
    assert "only the last 20 tokens of 6 prompts were asked" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"names\.json.*'truncation: error' asks to stop"):
        finery.train(keys(**short, truncation="error"))
    with pytest.raises(UserError, match="no sample is left to predict in eval: its prompt is longer than 20 tokens"):
        finery.train(keys(**short, truncation="drop"))


METRICS = """
def exact(answers, labels):
    assert all(isinstance(text, str) for text in answers + labels)
    return {"exact": sum(map(str.__eq__, answers, labels)) / len(labels), "count": len(answers)}

def broken(answers, labels):
    return answers[1000]

def text(answers, labels):
    return {"exact": "high"}

nothing = None
"""


def test_a_metric_of_one_s_own(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_own_metrics.py").write_text(METRICS)
    (tmp_path / "my_torn_metrics.py").write_text("import no_such_module_at_all")
    base = PREDICTS | {"eval_dataset": "names"}
    folder = finery.train(keys(**base, predict_metric="my_own_metrics:exact"))
    assert (results(folder)["predict_exact"], results(folder)["predict_count"]) == (0.0, 6.0)
    assert "predict_bleu-4" in results(folder)
    (folder / "generated_predictions.jsonl").unlink()
    for named, wanted in (("my_own_metrics:nothing", "has no function 'nothing'"), ("my_torn_metrics:x", "no_such_module_at_all")):
        with pytest.raises(UserError, match=wanted):
            finery.train(keys(**base, predict_metric=named))
    assert not (folder / "generated_predictions.jsonl").exists(), "it is found out before anything takes long"
    for named, wanted in (("broken", r"IndexError.*my_own_metrics.py, line 7"), ("text", "should return numbers by name")):
        with pytest.raises(UserError, match=wanted):
            finery.train(keys(**base, predict_metric=f"my_own_metrics:{named}"))
        assert len(lines(folder)) == 6


def test_without_jieba(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery.training.prediction.have", lambda _: False)
    with pytest.raises(UserError, match=r'the package jieba, which is not installed: pip install "finery\[metrics\]"'):
        finery.train(keys(**PREDICTS))
