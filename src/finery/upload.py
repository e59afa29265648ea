"""A folder becomes a model on a hub: Hugging Face, ModelScope or openMind, whichever the environment chooses."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from finery.errors import UserError
from finery.hub import HUBS, NETWORK, STATUSES, TROUBLES, Ask, Hub, active_hub, contact, diagnose, is_path, library_of, offline
from finery.log import get_logger

log = get_logger(__name__)

UPLOAD_TROUBLES: dict[str, tuple[str, str]] = {  # where a download's words do not fit
    **TROUBLES,
    **{trouble: (what, "check the network and the proxy") for trouble, (what, advice) in TROUBLES.items() if advice == NETWORK},
    "offline": ("{offline} is set", "unset {offline}"),
    "tokenless": ("there is no token", "{login}"),
    "missing": ("it has no such user or organisation, or your token does not let you see it", "check the name, or {login}"),
    "revision": ("it has no branch {revision!r}", "make one on {page}"),
    "forbidden": ("your account may not write there (403)", "check the name, and whether the token in {token_key!r} may write to {page}"),
    "quota": ("no more may be stored there: {answer}", "make room on {host}, or ask for more"),
    "taken": ("somebody else is changing it, or the name is taken (409)", "try again, or take another name"),
    "public": ("it is there already and public, but is to be private", "make it private on {page}, or take another name"),
    "broken": ("the hub itself has trouble ({status})", "try again later"),
    "full": ("the disk is full", "make room for what the upload keeps meanwhile"),
    "unwritable": ("a file cannot be read or written: {error}", "check its permissions"),
    "odd": ("{error}", "try again"),
}
UPLOAD_STATUSES = STATUSES | {402: "quota", 409: "taken", 413: "quota", 507: "quota"}
QUOTA = re.compile(r"quota|storage (limit|space)|limit reached", re.I)
"""Words with which a hub explains that it forbids (403) because of what is stored already."""
LATER = {"hf": "hf upload {name} {folder}", "ms": "modelscope upload {name} {folder}"}
"""Commands of the hubs' own packages that send a folder."""

WORD = r"(?=.{1,96}$)[A-Za-z0-9_]+([-.]+[A-Za-z0-9_]+)*"
LETTERS = "at most 96 of A-Z, a-z, 0-9 and '_' stand on either side of the '/', with '-' and '.' between them"
NAMES: dict[Hub, tuple[str, str, str]] = {
    "hf": (WORD, WORD, LETTERS),
    "ms": (WORD, WORD, LETTERS),
    "om": (
        r"[A-Za-z]([-_.]?[A-Za-z0-9]){2,39}", r"[A-Za-z0-9._-]{1,100}",
        "3 to 40 of A-Z, a-z, 0-9, beginning with a letter, stand before the '/', with '-', '_' and '.' between them",
    ),
}  # fmt: skip
"""Patterns of an organisation and of a repository, and what they say."""
KINDS = ("models", "datasets", "spaces")
"""What stands before a name in an address, and is no organisation."""


def check_name(name: str, key: str = "export_hub_model_id") -> None:
    """Refuse a name that no model on the active hub can have; nothing is asked of anybody. Raises `UserError`."""
    hub = active_hub()
    if why := _misfit(name, hub):
        raise UserError(f"{key!r}: {name!r} is not a name that {HUBS[hub].title} can have: {why}")


def check_upload(name: str, tokens: Mapping[Hub, str | None], key: str = "export_hub_model_id") -> None:
    """Refuse what is known to fail before the hub is asked: a name, a switch, a package or a token. Raises `UserError`."""
    check_name(name, key)
    ask = _ask(name, tokens)
    if offline():
        raise _refusal(ask, "offline")
    if ask.hub != "hf":
        library_of(ask.hub, f"to upload {name!r}")
    if not _has_token(ask):
        raise _refusal(ask, "tokenless")


def upload(folder: Path, name: str, *, tokens: Mapping[Hub, str | None], private: bool | None) -> str:
    """Send all files of a folder to the model `name`, which is made where it is missing, and return the address to show.

    `private` of nothing leaves it to the hub; a model that is there already keeps what it is, but one that is public is refused where
    it is to be private. What an interrupted upload has sent is not sent again. Raises `UserError`.
    """
    check_upload(name, tokens)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise UserError(f"there is no file to upload in {folder}")
    ask = _ask(name, tokens)
    send = {"hf": _send_hf, "ms": _send_ms, "om": _send_om}[ask.hub]
    log.info("uploading %s to %s as %s", folder, ask.place, name)
    try:
        contact(ask)
        name = send(ask, folder, private)
    except UserError:
        raise
    except Exception as error:  # three libraries with their own trees of exceptions: whatever they raise becomes one sentence
        log.debug("what the library said", exc_info=error)
        trouble, facts = diagnose(error, UPLOAD_STATUSES)
        trouble = "quota" if trouble == "forbidden" and QUOTA.search(facts["answer"]) else trouble
        later = LATER.get(ask.hub, "").format(name=name, folder=quote(str(folder)))
        raise _refusal(ask, trouble, facts, f". {folder} is complete{f'; {later!r} sends it later' if later else ''}") from None
    return f"{urlsplit(ask.endpoint).scheme}://{replace(ask, name=name).page}"


def _ask(name: str, tokens: Mapping[Hub, str | None]) -> Ask:
    hub = active_hub()
    return Ask(hub, "model", name, HUBS[hub].branch, None, tokens.get(hub) or None)


def _refusal(ask: Ask, trouble: str, facts: Mapping[str, str] = {}, tail: str = "") -> UserError:
    """One sentence without the token in it, whatever a library may have said."""
    what, advice = ask.explain(trouble, facts, UPLOAD_TROUBLES)
    text = f"the model {ask.name!r} cannot be uploaded to {ask.place}: {what}; {advice}{tail}"
    return UserError(text.replace(ask.token, "***") if ask.token else text)


def _misfit(name: str, hub: Hub) -> str:
    """Why a hub cannot have a model of this name, and what would do; or nothing."""
    form = "write it as 'organisation/name'"
    organisation, slash, rest = name.rpartition("/")
    if not name.strip():
        return f"it is empty; {form}"
    if "://" in name:
        parts = [part for part in urlsplit(name).path.split("/") if part not in ("", *KINDS)]
        return f"it is an address; write {'/'.join(parts[:2])!r}"
    if is_path(name):
        return f"it is a path; {form}"
    if slash and organisation in KINDS:
        return f"no organisation is called {organisation!r}; {form}"
    if not slash and hub != "hf":
        return f"it lacks the user or organisation; {form}"
    if hub == "hf" and ("--" in name or ".." in name or name.endswith(".git")):
        return f"'--', '..' and '.git' at the end are not allowed; {form}"
    owner_pattern, name_pattern, says = NAMES[hub]
    fits = re.fullmatch(name_pattern, rest) and (not slash or re.fullmatch(owner_pattern, organisation))
    return "" if fits else f"{says}; {form}"


def _has_token(ask: Ask) -> bool:
    """Whether there is a token, given here or kept by an earlier login."""
    if ask.token or ask.hub == "om":  # openMind keeps none that could be looked up
        return bool(ask.token)
    if ask.hub == "hf":
        from huggingface_hub import get_token

        return bool(get_token())
    from modelscope_hub.config import get_default_config

    return bool(get_default_config().token)


def _send_hf(ask: Ask, folder: Path, private: bool | None) -> str:
    """To Hugging Face; its library takes up again what was interrupted. Returns the full name, with the user before it."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=ask.endpoint, token=ask.token)
    name = api.create_repo(ask.name, private=private, repo_type="model", exist_ok=True).repo_id
    if private and api.model_info(name).private is False:
        raise _refusal(replace(ask, name=name), "public")
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by Finery")
    return name


def _send_ms(ask: Ask, folder: Path, private: bool | None) -> str:
    """To ModelScope, which is asked about each large file whether it has it already."""
    from modelscope.hub.api import HubApi

    api = HubApi(endpoint=ask.endpoint, token=ask.token)
    visibility = None if private is None else "private" if private else "public"
    with redirect_stdout(sys.stderr), _failures("modelscope_hub.upload"):  # it prints a report
        made = api.create_repo(ask.name, visibility=visibility, repo_type="model", exist_ok=True)
        if private and made is None and api.get_repo(ask.name, repo_type="model").visibility == 5:
            raise _refusal(ask, "public")
        # Its own notes of what was sent would lie among the files, and hold what has been deleted on the hub since.
        api.upload_folder(ask.name, folder, commit_message="Upload by Finery", use_cache=False)
    return ask.name


def _send_om(ask: Ask, folder: Path, private: bool | None) -> str:
    """To openMind."""
    library = library_of("om", f"to upload {ask.name!r}")
    library.create_repo(ask.name, token=ask.token, private=bool(private), repo_type="model", exist_ok=True)
    if private and library.model_info(ask.name, token=ask.token).private is False:
        raise _refusal(ask, "public")
    library.upload_folder(repo_id=ask.name, folder_path=folder, commit_message="Upload by Finery", token=ask.token)
    return ask.name


@contextmanager
def _failures(logger: str) -> Iterator[None]:
    """ModelScope logs why files failed, and raises an error that only counts them: the first reason becomes the cause of that error."""
    reasons: list[BaseException] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reasons.extend(part for part in record.args or () if isinstance(part, BaseException))

    listener = Listener(logging.ERROR)
    logging.getLogger(logger).addHandler(listener)
    try:
        yield
    except Exception as error:
        error.__cause__ = error.__cause__ or next(iter(reasons), None)
        raise
    finally:
        logging.getLogger(logger).removeHandler(listener)
