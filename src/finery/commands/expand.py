"""Give a model more layers to train, with which it computes the same as before (LLaMA-Pro)."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from finery.errors import UserError
from finery.log import get_logger

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """A model, a folder and a number."""
    parser.usage = "finery expand MODEL OUT --blocks N    (then train OUT with use_llama_pro: true, freeze_trainable_layers: N)"
    parser.add_argument("model", help="the model: a folder or a name")
    parser.add_argument("out", type=Path, help="the folder for the model with more layers")
    parser.add_argument("--blocks", type=int, required=True, help="how many layers are added; it must divide the number that there are")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: Namespace, words: list[str]) -> int:
    """Expand, prove that nothing has changed, and save."""
    if words:
        raise UserError(f"finery expand takes MODEL, OUT and --blocks, and not {words[0]!r}")
    expand(args.model, args.out, args.blocks, args.trust_remote_code)
    return 0


def expand(name: str, target: Path, number: int, trust_remote_code: bool = False) -> Path:
    """Save the model `name` with so many more layers in `target`; raises `UserError` where it would not compute the same."""
    import torch

    from finery.files import new_folder, usual_modes
    from finery.models.expansion import expand as put_in
    from finery.models.load import ModelOptions, load_model, locate_model, own_dtype
    from finery.models.quantized import own_quantization
    from finery.models.tokenizer import load_tokenizer, save_tokenizer

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: name a new folder")
    base = locate_model(ModelOptions(model_name_or_path=name))
    if own_quantization(base):
        raise UserError(f"{base} comes quantised: expand the model in 16 bits")
    tokenizer = load_tokenizer(base, trust_remote_code)
    model = load_model(base, own_dtype(base, trust_remote_code), trust_remote_code).eval()
    ids = torch.arange(24)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        before = model.config.get_text_config().num_hidden_layers
        put_in(model, number)
        if not torch.equal(model(input_ids=ids, use_cache=False).logits, wanted):
            raise UserError(f"layers of {name} that should be silent are not: models of this kind cannot be expanded so")
    with new_folder(target.resolve()) as folder:
        model.save_pretrained(str(folder))
        save_tokenizer(tokenizer, folder, None)
        usual_modes(folder)
    log.info(
        "%s has %d layers, and had %d: train with 'use_llama_pro: true' and 'freeze_trainable_layers: %d'",
        target,
        before + number,
        before,
        number,
    )
    return target
