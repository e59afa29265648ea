"""Models that have learnt a vector for each position have none for what lies beyond: no row may be longer."""

from pathlib import Path

from finery.models.load import has_own_code, read_model_config

_MOST_OFFSET = 8  # some keep a few rows before the first position, OPT two


def learnt_positions(folder: Path) -> int | None:
    """How many positions the model in `folder` has learnt; nothing where it computes them, such as rotary ones, or brings its own code."""
    if not (folder / "config.json").is_file() or has_own_code(folder):
        return None
    text = read_model_config(folder, False, None).get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or text.to_dict().get("rope_parameters"):
        return None
    from torch.nn import Embedding

    from finery.models.merging import bare_model

    model = bare_model(folder)
    tables = (part for part in model.modules() if isinstance(part, Embedding) and part is not model.get_input_embeddings())
    return most if any(most <= table.num_embeddings <= most + _MOST_OFFSET for table in tables) else None
