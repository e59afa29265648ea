"""What a full pass over a data set costs beside the bare tokenizer: `python benchmarks/encoding.py [rows] [pairs]`.

Both sides work on the same rows, with the same tokenizer and number of cores, one after the other, several times; the
medians and their ratio are printed. The bare side is `encode_batch_fast` over the texts that a pass tokenises, in batches
of a thousand and on all cores, texts in memory: no reading, no rendering, no labels, nothing written.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from made_rows import write

from finery.data.load import DataOptions, Preparation, load_rows, load_sets
from finery.data.packing import PackingOptions
from finery.data.rows.base import RowOptions
from finery.data.template import Template, TemplateOptions, load_template
from finery.methods.sft import SFT
from finery.models.demo_model import demo_model
from finery.models.tokenizer import load_tokenizer


def full_pass(path: Path, template: Template) -> tuple[float, float]:
    """Seconds of everything between the file and the tokens on the disk, index and hash of the file included; and once more, of a start
    that finds them there."""
    os.environ["FINERY_CACHE"] = cache = tempfile.mkdtemp(dir=path.parent)
    packing = PackingOptions(packing=True)
    rows = load_rows("chat", template, RowOptions(), packing)
    seconds = []
    for _ in ("first", "again"):
        began = time.perf_counter()
        sets = load_sets(DataOptions(dataset=str(path)), packing, Preparation(rows, SFT(SFT.Options()), "bench", 0, {}))  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - began)
        sets.stop()
    shutil.rmtree(cache, ignore_errors=True)
    return seconds[0], seconds[1]


def texts_of(path: Path, template: Template) -> list[str]:
    """The texts that a pass tokenises: of a named template its filled slots, else each conversation as it is rendered."""
    import json

    from finery.data.formats.alpaca import Alpaca
    from finery.data.formats.base import Columns, Tags

    form, texts = Alpaca(Columns(), Tags()), []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            texts += _texts(template, form.read(json.loads(line)))
    return texts


def _texts(template: Any, sample: Any) -> list[str]:
    if hasattr(template, "slots"):
        pieces, _ = template._laid_out(sample)
        return [piece for piece in pieces if isinstance(piece, str)]
    return [template._render(template.dicts(sample))]


def bare(tokenizer: Any, texts: list[str]) -> float:
    """Seconds of the tokenizer alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = tokenizer.backend_tokenizer
    began = time.perf_counter()
    for start in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    return time.perf_counter() - began


def main() -> None:
    """Print rows a second and ratios, for a named template and for the model's own."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    path = write(Path(tempfile.gettempdir()) / "finery-benchmarks", count)
    for name, limit in (("chatml", 1.25), (None, 1.6)):
        tokenizer = load_tokenizer(demo_model(), False)
        template = load_template(TemplateOptions(template=name), tokenizer)
        texts = texts_of(path, template)
        ours, again, theirs = [], [], []
        for _ in range(pairs):
            first, second = full_pass(path, template)
            ours.append(first)
            again.append(second)
            theirs.append(bare(tokenizer, texts))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        said = f"{count / statistics.median(ours):,.0f} rows/s, bare tokenizer {count / statistics.median(theirs):,.0f} rows/s"
        print(f"{name or 'own template'}: {said}, ratio {ratio:.2f} (goal {limit})")
        print(f"{name or 'own template'}: a second start takes all {count:,} rows from the cache in {statistics.median(again):.2f} s")


if __name__ == "__main__":
    main()
