"""What goes with what: `python benchmarks/matrix.py [--result FILE.json]`, on a tiny random model.

Every way to hold weights x every adapter x every optimizer is run for real: six steps with a checkpoint after three, and a resume from it,
whose weights must be equal to the last bit. With the usual optimizer the trained model is asked a question, and merged and asked again. A
cell says what happened: T trained (the loss fell), R resumed to the same weights, C chatted, M merged; or what the run was refused with.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from results import save
from safetensors.torch import load_file

from finery.commands.chat import answer
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.run import Run

FOLDER = Path(tempfile.gettempdir()) / "finery-benchmarks" / "matrix"
WEIGHTS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "bnb 8": {"quantization_bit": 8},
    "bnb 4": {"quantization_bit": 4},
    "torchao 8": {"quantization_bit": 8, "quantization_method": "torchao"},
    "quanto 8": {"quantization_bit": 8, "quantization_method": "quanto"},
    "hqq 4": {"quantization_bit": 4, "quantization_method": "hqq"},
    "hqq 3": {"quantization_bit": 3, "quantization_method": "hqq"},
    "hqq 2": {"quantization_bit": 2, "quantization_method": "hqq"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True},
    "oft": {"finetuning_type": "oft"},
    "ia3": {"finetuning_type": "peft", "peft_type": "ia3"},
    "vera": {
        "finetuning_type": "peft",
        "peft_type": "vera",
        "peft_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "learning_rate": 0.1,
    },
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "full": {"finetuning_type": "full"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch_fused": {},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "adafactor": {"optim": "adafactor"},
    "schedule_free_adamw": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
    "Muon": {"use_muon": True},
    "Adam-mini": {"use_adam_mini": True},
    "LOMO": {"optim": "lomo", "learning_rate": 0.1},  # SGD's rates
    "AdaLomo": {"optim": "adalomo", "learning_rate": 0.05},
    "GaLore": {"use_galore": True, "galore_rank": 4},
    "APOLLO": {"use_apollo": True, "apollo_rank": 4, "optim": "adamw_torch"},
    "BAdam": {"use_badam": True, "badam_switch_interval": 2},
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
ROWS = [{"instruction": f"What is {a} plus {b}?", "input": "", "output": f"{a} plus {b} is {a + b}."} for a in range(6) for b in range(4)]


def build() -> None:
    """The model, whose layers are wide enough for blocks of 64 weights, and its data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shutil.rmtree(FOLDER, ignore_errors=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([row["instruction"] + row["output"] for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(FOLDER / "model"))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)).save_pretrained(str(FOLDER / "model"))
    (FOLDER / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (FOLDER / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def keys(*changes: dict[str, Any]) -> dict[str, Any]:
    """Of one cell."""
    found: dict[str, Any] = {
        "model_name_or_path": str(FOLDER / "model"),
        "do_train": True,
        "dataset": "rows",
        "dataset_dir": str(FOLDER),
        "output_dir": str(FOLDER / "out"),
        "overwrite_output_dir": True,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
        "do_sample": False,
        "max_new_tokens": 3,
        "micro_batches_at_once": 1,
    }
    for change in changes:
        found |= change
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has saved."""
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def life(given: dict[str, Any], whole: bool) -> str:
    """The letters of one cell, or why it was refused."""
    try:
        folder = train(Run.from_dict(given, trains=True))
        log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        done = "T" if losses[-1] < losses[0] else "t"
        shutil.rmtree(FOLDER / "again", ignore_errors=True)
        again = given | {"output_dir": str(FOLDER / "again"), "resume_from_checkpoint": str(folder / "checkpoint-3")}
        resumed = weights(train(Run.from_dict(again, trains=True)))
        saved = weights(folder)
        done += "R" if saved.keys() == resumed.keys() and all(torch.equal(saved[name], resumed[name]) for name in saved) else "r"
        if whole:
            done += "C" if isinstance(answer(Run.from_dict(given), QUESTION), str) else "c"
            merged = export(Run.from_dict(given))
            asked = {"model_name_or_path": str(merged), "do_sample": False, "max_new_tokens": 3}
            done += "M" if isinstance(answer(Run.from_dict(asked), QUESTION), str) else "m"
        return done
    except UserError as error:
        return f"refused: {str(error).removeprefix('Python: ').splitlines()[0]}"


def pages(cells: list[dict[str, str]]) -> list[str]:
    """The tables of docs/precision.md: three planes of the cells, and what was refused and why, each once."""
    found = {(cell["weights"], cell["adapter"], cell["optimizer"]): cell["found"] for cell in cells}
    planes = [
        table(WEIGHTS, ADAPTERS, lambda row, column: found[row, column, "adamw_torch_fused"]),
        table(OPTIMIZERS, ADAPTERS, lambda row, column: found["16 bits", column, row]),
        table(OPTIMIZERS, WEIGHTS, lambda row, column: found[column, "lora", row]),
    ]
    why: dict[str, int] = {}
    for cell in cells:
        if cell["found"].startswith("refused: "):
            reason = cell["found"].removeprefix("refused: ")
            why[reason] = why.get(reason, 0) + 1
    return [*planes, "\n".join(f"- {count}: {reason}" for reason, count in sorted(why.items(), key=lambda pair: -pair[1]))]


def table(rows: Iterable[str], columns: Iterable[str], cell: Callable[[str, str], str]) -> str:
    """One plane; a dash is a refusal."""
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(list(columns))}"]
    return "\n".join(
        [*head, *(f"| {row} | {' | '.join('–' if ' ' in (found := cell(row, c)) else found for c in columns)} |" for row in rows)]
    )


def kept(args: argparse.Namespace) -> list[dict[str, str]]:
    """The cells of an earlier result that are not to be run again."""
    if args.result is None or not args.result.exists():
        return []
    chosen = {"weights": args.weights, "adapter": args.adapters, "optimizer": args.optimizers}
    earlier = json.loads(args.result.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in earlier if any(cell[name] not in words for name, words in chosen.items())]


def main() -> None:
    """Print and keep every cell; what raises anything but a refusal is a fault and is told as one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--result", type=Path, help="where to write the cells as JSON; others that the file holds already stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build()
    cells = kept(args)
    for held in args.weights:
        for adapter in args.adapters:
            for optimizer in args.optimizers:
                given = keys(WEIGHTS[held], ADAPTERS[adapter], OPTIMIZERS[optimizer])
                with contextlib.redirect_stderr(io.StringIO()):
                    try:
                        found = life(given, whole=not OPTIMIZERS[optimizer])
                    except Exception as error:
                        found = f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                cells.append({"weights": held, "adapter": adapter, "optimizer": optimizer, "found": found})
                print(f"{held:10} {adapter:7} {optimizer:20} {found}", flush=True)
            save(args.result, {"cells": cells})
    if len(cells) == len(WEIGHTS) * len(ADAPTERS) * len(OPTIMIZERS):
        print("\n\n".join(pages(cells)))


if __name__ == "__main__":
    main()
