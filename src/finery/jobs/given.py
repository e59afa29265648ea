"""What a job is started with: its words and its file as they are now, without the secrets in them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finery.files import replace_text
from finery.reader import read_keys
from finery.training.output import is_secret

_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Given:
    """Words that may be written down, the text of the file that they name, and the secrets as variables of the environment."""

    words: list[str]
    text: str | None
    secrets: dict[str, str]

    @classmethod
    def read(cls, words: Sequence[str], cwd: Path) -> "Given":
        """Take the secrets out of words that make a run."""
        secrets: dict[str, str] = {}
        names_file = bool(words) and not words[0].startswith("-") and "=" not in words[0]
        text = _read_file(cwd / words[0], secrets) if names_file else None
        return cls(_without_secrets(list(words), secrets), text, secrets)

    def put(self, folder: Path) -> list[str]:
        """Lay the file down in a folder, where nobody edits it while the job waits; returns the words that name it there."""
        if self.text is None:
            return self.words
        path = folder / "given" / Path(self.words[0]).name
        path.parent.mkdir(mode=0o700)
        replace_text(path, self.text)
        path.chmod(0o600)
        return [str(path), *self.words[1:]]


def _hide(key: str, value: str, secrets: dict[str, str]) -> str:
    """The reference that stands for a secret."""
    name = f"FINERY_GIVEN_{re.sub(r'[^A-Za-z0-9]', '_', key).upper()}"
    secrets[name] = value
    return f"${{env:{name}}}"


def _without_secrets(words: list[str], secrets: dict[str, str]) -> list[str]:
    kept = []
    while words:
        word = words.pop(0)
        dashes = "--" if word.startswith("--") else ""
        key, equals, value = word.removeprefix("--").partition("=")
        if not is_secret(key.replace("-", "_")) or not (equals or dashes):
            kept.append(word)
        elif equals:
            kept.append(f"{dashes}{key}={_hide(key, value, secrets)}")
        else:
            follows = bool(words) and not words[0].startswith("--")
            kept += [word, _hide(key, words.pop(0), secrets)] if follows else [word]
    return kept


def _read_file(path: Path, secrets: dict[str, str]) -> str:
    """The text of a run's file; what is secret in it is replaced in its own line, so that places stay what they were."""
    text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")
    for key, entry in read_keys([str(path)], []).items():
        place = entry.source.rpartition(":")[2]
        value = entry.value
        if is_secret(key) and isinstance(value, str) and len(value) >= _SHORTEST_SECRET and place.isdigit():
            line = lines[int(place) - 1]
            if value in line:
                lines[int(place) - 1] = line.replace(value, _hide(f"file_{key}", json.dumps(value), secrets))
    return "\n".join(lines)
