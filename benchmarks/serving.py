"""Answers a second beside other servers: `python benchmarks/serving.py [--clients 8] [--tokens 64] [--rounds 3] [--result FILE.json]`.

SmolLM2-135M-Instruct behind `finery api`; behind LLaMA-Factory's `api` where FINERY_PEER names its Python (see peer.py); behind
`transformers serve` with `--transformers`. One server runs at a time, each is asked the same, greedily, in turn, and medians of the rounds
are told: tokens a second of all clients together, of one stream alone, and the time to its first token. `--engine huggingface openvino`
serves with each of these engines in turn, the first of which is `finery` in the result; `--model FILE` serves something else, `--keys
gguf_type=f16` with other keys.

What comes out is checked, too: the text of an answer among others is that of the same answer alone, tokens of several answers come in
turn, and one that was asked for later ends earlier.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from peer import as_fp32, peer_python
from results import save

from finery.models.demo_model import demo_model

QUESTIONS = (
    "Write a long story about a lighthouse keeper.", "Explain in detail how bread is baked.", "Describe the life of a honey bee.",
    "Write a letter to a friend about a journey by train.", "Explain how a bicycle works.", "Describe a storm at sea.",
    "Write about the history of writing.", "Explain why leaves change colour in autumn.",
)  # fmt: skip
"""Each is answered with more tokens than are asked for."""
SECONDS_TO_START = 240.0
WRITE = ("openvino", "llamacpp")
"""Engines that write a file of their own of a model, once."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """A server that is there for the block; its address."""
    address = f"http://127.0.0.1:{port}/v1"
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and run.poll() is None:
            try:
                if requests.get(f"{address}/models", timeout=5).status_code == 200:
                    break
            except requests.RequestException:
                time.sleep(0.3)
        else:
            raise SystemExit(f"{' '.join(command)} did not serve:\n{log.read_text(encoding='utf-8')[-3000:]}")
        yield address
    finally:
        run.terminate()
        run.wait(60)


def ask(address: str, model: str, question: str, tokens: int) -> tuple[str, int]:
    """A whole answer, and how many tokens it has."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    told = requests.post(f"{address}/chat/completions", json=body, timeout=300).json()
    return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"]


def stream(address: str, model: str, question: str, tokens: int) -> list[float]:
    """When each piece of an answer came."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0, "stream": True}
    times = []
    with requests.post(f"{address}/chat/completions", json=body, timeout=300, stream=True) as response:
        for line in response.iter_lines(chunk_size=1, decode_unicode=True):
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"]
                if delta and delta[0]["delta"].get("content"):
                    times.append(time.perf_counter())
    return times


def measure(address: str, model: str, clients: int, tokens: int) -> dict[str, Any]:
    """One round."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda question: ask(address, model, question, tokens), (QUESTIONS * clients)[:clients]))
    together = sum(count for _, count in answers) / (time.perf_counter() - began)
    began = time.perf_counter()
    alone, count = ask(address, model, QUESTIONS[0], tokens)
    single = count / (time.perf_counter() - began)
    began = time.perf_counter()
    first = stream(address, model, QUESTIONS[1], 8)[0] - began
    return {"together": together, "alone": single, "first_token_seconds": first, "same_text": alone == answers[0][0]}


def interleaving(address: str, model: str) -> dict[str, Any]:
    """How many answers come in turn, and whether a short one that was asked for last ends first."""
    with ThreadPoolExecutor(5) as pool:
        long = [pool.submit(stream, address, model, question, 320) for question in QUESTIONS[:4]]
        time.sleep(0.5)
        short = pool.submit(stream, address, model, QUESTIONS[4], 4).result()
        times = [future.result() for future in long]
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    return {"answers_in_turn": sum(any(begin <= moment <= end for moment in each) for each in times), "later_ends_earlier": short[-1] < end}


def main() -> None:
    """Serve, ask, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", nargs="+", default=["huggingface"])
    parser.add_argument("--keys", nargs="*", default=[], help="more keys of a run")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--transformers", action="store_true", help="measure `transformers serve`, too (it needs `openai`)")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"clients": args.clients, "tokens": args.tokens, "engine": args.engine}
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        model = args.model or as_fp32(demo_model(), room / "fp32")
        start = [sys.executable, "-m", "finery", "api", *args.keys]
        servers = {}
        for engine in args.engine:  # whatever is written into the cache is written for the model that stays
            named = args.model or (demo_model() if engine in WRITE else model)
            words = [f"model_name_or_path={named}", f"infer_backend={engine}"]
            servers[engine if servers else "finery"] = ([*start, *words], "any")
        if (python := peer_python()) is not None:
            config = {"model_name_or_path": str(as_fp32(demo_model(), room / "fp32")), "template": "chatml", "infer_backend": "huggingface"}
            (room / "peer.yaml").write_text(json.dumps(config), encoding="utf-8")
            servers["peer"] = ([str(python), "-m", "llamafactory.cli", "api", str(room / "peer.yaml")], "any")
        for label, (command, asked) in servers.items():
            port = free_port()
            with server(command, port, room / f"{label}.log", API_PORT=str(port), API_HOST="127.0.0.1", API_MODEL_NAME=asked) as address:
                measure(address, asked, 2, 4)
                rounds = [measure(address, asked, args.clients, args.tokens) for _ in range(args.rounds)]
                found[label] = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0] if key != "same_text"}
                found[label]["same_text"] = all(one["same_text"] for one in rounds)
                if label == "finery":
                    found |= interleaving(address, asked)
        if args.transformers:
            port = free_port()
            command = [str(Path(sys.executable).with_name("transformers")), "serve", "--port", str(port), "--host", "127.0.0.1"]
            (room / "hub").mkdir()  # it lists what is in there, and fails where there is no such folder
            with server(command, port, room / "transformers.log", HF_HUB_CACHE=str(room / "hub")) as address:
                asked = str(model)
                ask(address, asked, QUESTIONS[0], 4)
                rounds = [measure(address, asked, args.clients, args.tokens) for _ in range(args.rounds)]
                found["transformers"] = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
    for label in [label for label in ("peer", "transformers") if label in found]:
        for engine in ("finery", *args.engine[1:]):
            ratios = {key: round(found[engine][key] / found[label][key], 3) for key in ("together", "alone", "first_token_seconds")}
            found[f"ratio_to_{label}" if engine == "finery" else f"ratio_of_{engine}_to_{label}"] = ratios
    print(json.dumps(found, indent=1))
    save(args.result, found)


if __name__ == "__main__":
    main()
