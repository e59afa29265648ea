"""BLEU and ROUGE: by hand, by figures that nltk 3.10 and rouge_chinese 1.0.3 gave, and by these packages where they are installed."""

import random
from collections.abc import Sequence

import pytest

from finery.predictions.predict import score
from finery.predictions.scores import NAMES, bleu, lcs_length, rouge_l, rouge_n, scores, words


def test_bleu_by_hand() -> None:
    assert bleu("abcdef", "abcdef") == 1.0
    assert bleu("", "abc") == bleu("xyz", "abc") == bleu("abc", "") == 0.0
    # abd against abc: 2/3, 1/2, none of 1 (half of one), none of 0 (a quarter of one)
    assert bleu("abd", "abc") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** 0.25)
    # half as long: e^(1 - 8/4)
    assert bleu("abcd", "abcdefgh") == pytest.approx(0.36787944117144233)


def test_rouge_by_hand() -> None:
    ours, theirs = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "a", "mat"]
    # 5 different words of ours, 6 of theirs, 4 in common
    assert rouge_n(ours, theirs, 1) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6), abs=1e-7)
    assert rouge_n(ours, theirs, 2) == pytest.approx(1 / 5, abs=1e-7)
    assert rouge_l(ours, theirs) == pytest.approx(4 / 6, abs=1e-7)
    assert rouge_l([], theirs) == rouge_n(ours, [], 1) == 0.0


def table(one: Sequence[str], other: Sequence[str]) -> int:
    """As in a textbook."""
    row = [0] * (len(other) + 1)
    for a in one:
        new = [0]
        for place, b in enumerate(other):
            new.append(row[place] + 1 if a == b else max(row[place + 1], new[-1]))
        row = new
    return row[-1]


def test_the_longest_common_sequence_is_the_textbook_s() -> None:
    dice = random.Random(1)
    for _ in range(300):
        one, other = ([dice.choice("abcde") for _ in range(dice.randrange(90))] for _ in range(2))
        assert lcs_length(one, other) == table(one, other)


def test_words() -> None:
    pytest.importorskip("jieba")
    assert words("你是谁？我是一个很小的模型。") == ["你", "是", "谁", "？", "我", "是", "一个", "很小", "的", "模型", "。"]
    assert words("谁？\n我") == ["谁", "？", "", "我"]
    assert words("Hello,  world 3.5%") == ["Hello", ",", "world", "3.5%"]
    assert words("a\n\nb") == ["a", "", "b"]
    assert words(" \n ") == []


GIVEN: list[tuple[str, str, tuple[float, ...]]] = [
    ("我是一个小模型，为测试而生。", "我是一个很小的模型。", (22.7187, 58.8235, 26.6667, 58.8235)),
    ("The capital of France is Paris.", "Paris is the capital of France.", (83.0239, 85.7143, 33.3333, 57.1429)),
    ("你好！\n\n今天天气不错，“出去走走。”他说……好吧", "今天天气很好。\n\n他说：“我们出去走走吧。”", (25.1982, 73.3333, 25.0, 41.1765)),
    ("........... a b", "a ....... b", (54.8723, 75.0, 0.0, 50.0)),
    ("", "x", (0.0, 0.0, 0.0, 0.0)),
]
"""Answer, label, and the figures of `NAMES`."""


@pytest.mark.parametrize(("answer", "label", "given"), GIVEN)
def test_figures_of_the_packages(answer: str, label: str, given: tuple[float, ...]) -> None:
    pytest.importorskip("jieba")
    assert tuple(scores(answer, label)[name] for name in NAMES) == given


@pytest.mark.filterwarnings("ignore")
def test_the_packages_themselves() -> None:
    jieba, rouge = pytest.importorskip("jieba"), pytest.importorskip("rouge_chinese")
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    dice = random.Random(3)
    for _ in range(60):
        label = (
            "".join(dice.choice(["你好", "世界", " the ", "cat", "。", "？", "\n", "……", ".", "”", "，", "3.5%"]) for _ in range(30))
            + "end"
        )
        answer = "".join(letter for letter in label if dice.random() < 0.8) + "z"
        told = rouge.Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(label)))[0]
        theirs = {name: round(100 * value["f"], 4) for name, value in told.items()}
        smooth = nltk.SmoothingFunction().method3
        theirs["bleu-4"] = round(100 * nltk.sentence_bleu([list(label)], list(answer), smoothing_function=smooth), 4)
        assert scores(answer, label) == pytest.approx(theirs, abs=1e-9)


def test_a_set_s_score_is_the_mean_over_what_has_a_label() -> None:
    pytest.importorskip("jieba")
    found = score(["same", "same", "other"], ["same", "x", None], None)
    assert found == {"bleu-4": 50.0, "rouge-1": 50.0, "rouge-2": 0.0, "rouge-l": 50.0}
    assert score(["a"], [None], None) == {}
    assert score(["a", "b"], ["a", None], lambda answers, labels: {"n": len(answers), "empty": labels.count("")})["empty"] == 1
