"""`finery train --detach` and `finery jobs` on real runs: a model is trained in the background, watched, stopped."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from background import own_jobs, until
from finery import jobs
from finery.cli import main
from finery.jobs import Job, Status
from finery.jobs.given import Given
from finery.jobs.process import family

Keys = Callable[..., dict[str, Any]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of jobs beside the run's, for each test."""
    monkeypatch.chdir(tmp_path)
    with own_jobs(tmp_path / "jobs", monkeypatch) as folder:
        yield folder


def write(keys: dict[str, Any], name: str = "x.yaml") -> str:
    Path(name).write_text(json.dumps(keys) if name.endswith(".json") else yaml.safe_dump(keys, sort_keys=False))
    return name


def reach(job: Job, holds: Callable[[Status], Any], seconds: float = 180) -> Status:
    end = time.monotonic() + seconds
    while not holds(status := job.status()):
        assert time.monotonic() < end, (status, list(job.lines()))
        time.sleep(0.1)
    return status


def test_a_run_in_the_background(keys: Keys, tmp_path: Path, capsys: Capture) -> None:
    """From a shell that ends at once; the file is edited while the job waits, and what was checked is what is trained."""
    name = write(keys(output_dir="out", hf_hub_token="hf_in_the_file"))
    command = [
        sys.executable,
        "-m",
        "finery",
        "train",
        name,
        "max_steps=3",
        "--ms_hub_token",
        "ms-in-the-words",
        "--detach",
        "--name",
        "tiny",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, start_new_session=True)
    assert done.returncode == 0, done.stderr
    job = jobs.find(done.stdout.strip())
    assert job == jobs.find("tiny")
    assert f"finery jobs follow {job.id}" in done.stderr
    assert not job.status().has_ended
    write(keys(output_dir="another", no_such_key=1))
    assert main(["jobs", "follow", "tiny", "--lines", "9999"]) == 0
    told = capsys.readouterr()
    assert "done: train_loss" in told.out
    assert f"job {job.id} has finished; everything is in out" in told.err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not Path("another").exists()
    status = job.status()
    assert (status.state, status.exit_code) == ("finished", 0)
    assert status.progress
    assert (status.progress.step, status.progress.total) == (3, 3)
    every = [path for path in job.folder.rglob("*") if path.is_file()]
    assert len(every) >= 5
    assert not [path for path in every if b"in_the_file" in path.read_bytes() or b"in-the-words" in path.read_bytes()]


def test_a_run_that_is_stopped_and_one_that_waits_for_it(keys: Keys, capsys: Capture) -> None:
    steps = {"max_steps": 100_000, "dataloader_num_workers": 0}
    assert main(["train", write(keys(output_dir="long", **steps)), "--detach"]) == 0
    assert main(["train", write(keys(output_dir="next", max_steps=1)), "--detach"]) == 0
    first, second = (jobs.find(line) for line in capsys.readouterr().out.split())
    reach(first, lambda status: status.progress and status.progress.step > 2)
    assert second.status().state == "queued"
    assert main(["jobs"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["id", "name", "state", "step", "loss", "left", "time", "output"]
    assert [row[2] for row in rows[1:]] == ["running", "queued"]
    assert rows[1][3].endswith("/100000")
    assert float(rows[1][4]) > 0
    assert main(["jobs", "stop", second.id]) == 0
    assert main(["jobs", "stop", first.id, "--wait", "120"]) == 0
    assert [job.status().state for job in (first, second)] == ["stopped", "stopped"]
    until(lambda: not family(str(first.folder)))  # its end is written down before what it has started is gone
    assert not Path("next").exists()
    assert main(["jobs", "remove", first.id, second.id]) == 0
    assert Path("long").is_dir()
    assert not jobs.jobs()


def test_a_fault_is_told_at_once_and_leaves_no_job(keys: Keys, root: Path, capsys: Capture) -> None:
    assert main(["train", write(keys(lora_rnak=8)), "--detach"]) == 2
    assert "did you mean 'lora_rank'" in capsys.readouterr().err
    assert not root.exists() or not jobs.jobs()
    assert main(["train", write(keys()), "--detach", "--name", "not good"]) == 2
    assert main(["train", write(keys()), "--name", "good"]) == 2
    assert "needs --detach" in capsys.readouterr().err
    assert not jobs.jobs()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["follow", "none"], "there is no job 'none'; there are none at all"),
        (["stop"], "'finery jobs stop' takes the id of one job, found 0"),
        (["list", "x"], "'finery jobs list' takes no id, found 1"),
        (["folow", "x"], "jobs cannot be asked to 'folow'; did you mean 'follow'?"),
        (["--jsno"], "there is no '--jsno' here"),
    ],
)
def test_what_cannot_be_asked(words: list[str], complaint: str, capsys: Capture) -> None:
    assert main(["jobs", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_an_empty_list(capsys: Capture) -> None:
    assert main(["jobs"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "--detach starts one" in told.err
    assert main(["jobs", "--json"]) == 0
    assert capsys.readouterr().out == ""


def quick(code: str, **order: Any) -> Job:
    return jobs.submit(jobs.Order(["x.yaml"], Path.cwd(), ["one"], **order), lambda folder: [sys.executable, "-c", code])


def test_a_list_in_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("raise SystemExit(3)", name="wrong", output_dir="[red]out[/red]")
    reach(job, lambda status: status.has_ended)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["jobs"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in (job.id, "wrong", "failed", "[red]out[/red]"))
    assert main(["jobs", "follow"]) == 1
    assert f"job {job.id} has failed: exit code 3" in capsys.readouterr().err


def test_ctrl_c_ends_the_following_alone() -> None:
    job = quick("import time; print('up', flush=True); time.sleep(600)")
    # a shell may have started the tests with Ctrl-C ignored, which Python then leaves so
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from finery.cli import main; "
    command = [sys.executable, "-c", heard + f"raise SystemExit(main(['jobs', 'follow', '{job.id}']))"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout
    assert follower.stdout.readline() == "up\n"
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert f"job {job.id} goes on" in said
    assert job.status().state == "running"


def test_a_stop_that_is_not_heard(capsys: Capture) -> None:
    job = quick("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)")
    reach(job, lambda _: list(job.lines()))
    assert main(["jobs", "stop", job.id, "--wait", "0.5"]) == 1
    assert f"finery jobs stop {job.id} --now kills it" in capsys.readouterr().err
    assert main(["jobs", "stop", job.id, "--now"]) == 0
    assert f"job {job.id} has stopped: it was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        (["hf_hub_token=hf_1"], ["hf_hub_token=${env:FINERY_GIVEN_HF_HUB_TOKEN}"]),
        (["--hf-hub-token=hf_1"], ["--hf-hub-token=${env:FINERY_GIVEN_HF_HUB_TOKEN}"]),
        (["--hf_hub_token", "hf_1", "a=b"], ["--hf_hub_token", "${env:FINERY_GIVEN_HF_HUB_TOKEN}", "a=b"]),
        (["--a.api_key", "hf_1"], ["--a.api_key", "${env:FINERY_GIVEN_A_API_KEY}"]),
        (["--hub_token", "--b", "c"], ["--hub_token", "--b", "c"]),
        (["skip_special_token=x", "a=hf_hub_token"], ["skip_special_token=x", "a=hf_hub_token"]),
    ],
)
def test_secrets_in_words(word: list[str], kept: list[str]) -> None:
    given = Given.read(word, Path.cwd())
    assert given.words == kept
    assert list(given.secrets.values()) == (["hf_1"] if kept != word else [])


@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_secrets_in_a_file(name: str, keys: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The copy reads as the file does, line for line; a reference stays one."""
    from finery.reader import read_keys

    monkeypatch.setenv("TOKEN", "of the environment")
    write(keys(hf_hub_token="hf_12345678", ms_hub_token="${env:TOKEN}", run_name="12345678"), name)
    given = Given.read([name, "seed=1"], Path.cwd())
    assert list(given.secrets) == ["FINERY_GIVEN_FILE_HF_HUB_TOKEN"]
    words = given.put(tmp_path)
    assert words == [str(tmp_path / "given" / name), "seed=1"]
    assert "hf_12345678" not in Path(words[0]).read_text()
    assert Path(words[0]).stat().st_mode & 0o777 == 0o600
    for variable, value in given.secrets.items():
        monkeypatch.setenv(variable, value)
    before, after = (read_keys([path], []) for path in (name, words[0]))
    assert {key: entry.value for key, entry in after.items()} == {key: entry.value for key, entry in before.items()}
    assert [entry.source.rpartition(":")[2] for entry in after.values()] == [entry.source.rpartition(":")[2] for entry in before.values()]
