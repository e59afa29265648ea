"""Clients of the server are told with 400 what an engine cannot do, and get the rest."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engines.opening import CAN, half_model, opened
from finery.serve.service import Settings
from serving import FORMAT, PLAIN, post, running, template_for

ASKED = {
    "form": {"response_format": FORMAT},
    "likeliest": {"logprobs": True, "top_logprobs": 2},
    "penalty": {"presence_penalty": 1.0},
    "logprob": {"logprobs": True},
}


@pytest.mark.parametrize("kind", ["openvino", "vllm", "sglang"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_is_told(kind: str, stream: bool, tmp_path: Path) -> None:
    base = half_model(tmp_path / "base")
    template = template_for(AutoTokenizer.from_pretrained(str(base)), "chatml")
    with opened(kind, base) as engine, running(engine, template, Settings(name="m", generation=PLAIN)) as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "temperature": 0, "stream": stream}
        for what, fields in ASKED.items():
            got = post(server, body | fields)
            if what in CAN[kind]:
                assert got.status_code == 200, got.text
            else:
                assert got.status_code == 400 and f"'infer_backend: {kind}' cannot" in got.json()["error"]["message"]
        embeddings = post(server, {"model": "m", "input": "Who?"}, "/v1/embeddings")
        assert embeddings.status_code == 400 and "cannot make embeddings" in embeddings.json()["error"]["message"]
