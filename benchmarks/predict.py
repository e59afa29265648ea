"""Predicting beside LLaMA-Factory 0.9.5: `python benchmarks/predict.py [--rows 200] [--pairs 1] [--tokens 64] [--threads 2]`.

Both programs answer the same rows with the same model, SmolLM2-135M-Instruct, greedily, with `do_predict` and `predict_with_generate`,
one after the other; seconds are those of the whole command, of the predictions alone (`predict_runtime`), and their ratios are printed.
So are the scores, which both compute: of the same text they are the same. The peer is given each number of rows in a batch
(`per_device_eval_batch_size`) that `--batches` names, and its fastest counts; and the format that is faster for it, bf16 or fp32.
FINERY_PEER names the peer's Python, see peer.py; without one Finery is measured alone.

The peer's environment needs jieba, nltk and rouge_chinese for its scores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_rows import rows
from peer import as_fp32, peer_config, peer_python
from results import save

from finery.models.demo_model import demo_model

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "predict"
NAMES = ("predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l")


@dataclass
class Measured:
    """What one run showed."""

    seconds: float
    predict_seconds: float
    num_answers: int
    num_characters: int
    scores: dict[str, float]


def write_set(count: int) -> None:
    """The data set `rows` in FOLDER, which both programs read: short questions, as users ask them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "rows.json"
    path.write_text(json.dumps(list(rows(count)), ensure_ascii=False), encoding="utf-8")
    (FOLDER / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def keys(model: Path, out: Path, tokens: int, **changes: Any) -> dict[str, Any]:
    """What both are asked for."""
    predicts = {"do_train": False, "eval_dataset": "rows", "do_predict": True, "predict_with_generate": True}
    greedy = {"do_sample": False, "max_new_tokens": tokens, "cutoff_len": 1024}
    given = peer_config(model, FOLDER, "rows", out, **predicts, **greedy, **changes)
    trains = ("dataset", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "save_strategy")
    return {key: value for key, value in given.items() if key not in trains}


def run(command: list[str], out: Path, threads: int) -> Measured:
    """One command to its end."""
    shutil.rmtree(out, ignore_errors=True)
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with (FOLDER / "log.txt").open("w", encoding="utf-8") as log:
        ended = subprocess.run(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - began
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}; see {FOLDER / 'log.txt'}")
    told = json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    answers = [json.loads(line)["predict"] for line in (out / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {name: told[name] for name in NAMES}
    return Measured(seconds, told["predict_runtime"], len(answers), sum(map(len, answers)), scores)


def ours(tokens: int, threads: int, more: list[str]) -> Measured:
    """Finery's run."""
    given = keys(demo_model(), FOLDER / "finery", tokens)
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return run([sys.executable, "-m", "finery", "train", *words, *more], FOLDER / "finery", threads)


def theirs(tokens: int, threads: int, batch: int, fp32: bool) -> Measured:
    """The peer's."""
    model = as_fp32(demo_model(), FOLDER / "fp32") if fp32 else demo_model()
    given = keys(model, FOLDER / "peer", tokens, per_device_eval_batch_size=batch)
    (FOLDER / "peer.yaml").write_text(json.dumps(given), encoding="utf-8")
    return run([str(peer_python()), "-m", "llamafactory.cli", "train", str(FOLDER / "peer.yaml")], FOLDER / "peer", threads)


def best_of_grid(tokens: int, threads: int, batches: list[int]) -> tuple[int, bool]:
    """The peer's fastest setting on a few rows; each is printed."""
    found = {}
    for batch in batches:
        for fp32 in (False, True):
            one = theirs(tokens, threads, batch, fp32)
            found[batch, fp32] = one.predict_seconds
            print(f"  peer, {batch} rows in a batch, {'fp32' if fp32 else 'bf16'}: {one.predict_seconds:.1f} s", flush=True)
    return min(found, key=lambda setting: found[setting])


def main() -> None:
    """Print the seconds and their ratio, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="what the peer is tried with, on a tenth of the rows")
    parser.add_argument("--result", type=Path, help="where to write the result as JSON")
    parser.add_argument("more", nargs="*", help="further keys for Finery, key=value")
    args = parser.parse_args()
    setting = (0, False)
    if peer_python():
        write_set(max(args.rows // 10, 1))
        setting = best_of_grid(args.tokens, args.threads, args.batches)
    write_set(args.rows)
    runs: dict[str, list[Measured]] = {"peer": [], "finery": []} if peer_python() else {"finery": []}
    for _ in range(args.pairs):
        for who, done in runs.items():
            done.append(theirs(args.tokens, args.threads, *setting) if who == "peer" else ours(args.tokens, args.threads, args.more))
            print(f"  {who}: {done[-1]}", flush=True)
    found: dict[str, Any] = {"rows": args.rows, "tokens": args.tokens, "threads": args.threads}
    for field in ("seconds", "predict_seconds"):
        medians = {who: round(statistics.median(getattr(one, field) for one in done), 2) for who, done in runs.items()}
        found[field] = medians | ({"ratio": round(medians["peer"] / medians["finery"], 2)} if peer_python() else {})
        print(f"{field}: {', '.join(f'{name} {value:.2f}' for name, value in found[field].items())}", flush=True)
    found["scores"] = {who: done[-1].scores for who, done in runs.items()}
    if peer_python():
        found["peer setting"] = f"{setting[0]} rows in a batch, {'fp32' if setting[1] else 'bf16'}"
    save(args.result, found)


if __name__ == "__main__":
    main()
