"""Settings that are handed to another library as they are: a mapping, or the JSON text of one."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator


def _read(value: object) -> object:
    """LLaMA-Factory takes a text that begins with a brace."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"should be a mapping, or the JSON text of one ({error})") from None


JsonDict = Annotated[dict[str, Any], BeforeValidator(_read)]
