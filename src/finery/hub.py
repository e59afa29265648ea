"""A name becomes a local folder: that folder itself, or a snapshot from Hugging Face, ModelScope or openMind."""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from finery.compat import is_on, need
from finery.errors import UserError, suggestion
from finery.log import get_logger

Hub = Literal["hf", "ms", "om"]
Kind = Literal["model", "dataset"]
T = TypeVar("T")


class UnknownName(UserError):
    """A hub has no model or data set of that name, or was not asked and the cache has none."""


PATIENCE_SECONDS = 10
"""How long a hub may take for one answer; the first contact as a whole, name look-up included, gets two seconds more."""
FOREIGN = ("original/*", "onnx/*", "*.onnx*", "tf_model*", "flax_model*", "*.msgpack", "*.h5", "*.ot", "coreml/*", "openvino/*")
"""Files of a model that only other frameworks read."""
DOUBLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "consolidated*")
"""The same weights once more, wherever the model has them as model*.safetensors."""


@dataclass(frozen=True)
class _Hub:  # what differs between the hubs
    title: str
    endpoint: str
    endpoint_variables: tuple[str, ...]
    login: str
    elsewhere: str
    cache_variable: str = ""
    cache: str = ""
    branch: str = "main"


HUBS: dict[Hub, _Hub] = {
    "hf": _Hub("Hugging Face", "https://huggingface.co", ("HF_ENDPOINT",), "set 'hf_hub_token' or run 'hf auth login'",
               "try USE_MODELSCOPE_HUB=1"),
    "ms": _Hub("ModelScope", "https://modelscope.cn", ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"), "set 'ms_hub_token'",
               "unset USE_MODELSCOPE_HUB to use Hugging Face", "MODELSCOPE_CACHE", "~/.cache/modelscope", "master"),
    "om": _Hub("openMind", "https://modelers.cn", ("OPENMIND_HUB_ENDPOINT",), "set 'om_hub_token'",
               "unset USE_OPENMIND_HUB to use Hugging Face", "XDG_CACHE_HOME", "~/.cache"),
}  # fmt: skip

NETWORK = "check the network and the proxy, set {endpoint_key} to a mirror, {elsewhere}"
TROUBLES: dict[str, tuple[str, str]] = {  # what happened, and what would do
    "offline": ("{offline} is set", "unset {offline}, or give a local folder"),
    "revision": ("it has no revision {revision!r}", "check {revision_key}"),
    "gated": ("access to it has to be granted first", "ask for it on {page}, then {login}"),
    "unnamed": ("that is not a name a hub can have", "write it as 'organisation/name', or give a local folder"),
    "missing": ("it has no such {kind}{at_revision}, or it is private", "check the name, {login} if it is private, {elsewhere}"),
    "login": ("it asks for a token that is valid (401)", "{login}"),
    "forbidden": ("your account may not read it (403)", "check what the token in {token_key!r} is allowed to on {page}"),
    "busy": ("it has been asked too often (429)", "wait some minutes, or {login}"),
    "broken": ("the hub itself has trouble ({status})", "try again later, {elsewhere}"),
    "full": ("the disk is full", "make room, or set 'cache_dir' to a folder on another disk"),
    "unwritable": ("the cache folder cannot be written", "set 'cache_dir' to a folder of your own"),
    "proxy": ("the proxy refuses the connection", "check HTTP_PROXY and HTTPS_PROXY"),
    "nameless": ("the network does not know a host {host}", NETWORK),
    "refused": ("nothing answers at {host}", NETWORK),
    "certificate": ("the certificate of {host} is not trusted", "give SSL_CERT_FILE and REQUESTS_CA_BUNDLE those of your network"),
    "slow": ("{host} does not answer in time", NETWORK),
    "cut": ("the connection to {host} breaks off", NETWORK),
    "odd": ("{error}", "try again, {elsewhere}"),
}

# By name, since the libraries and their HTTP clients are imported only when they are used. The order decides: a gated repository is also
# a missing one, and urllib3 calls a host that cannot be reached a timeout, so that ERRNOS and STATUSES come before the late signs.
SIGNS = {
    "OfflineModeIsEnabled": "offline", "RevisionNotFoundError": "revision", "GatedRepoError": "gated", "HFValidationError": "unnamed",
    "OMValidationError": "unnamed", "RepositoryNotFoundError": "missing", "NotExistError": "missing", "ProxyError": "proxy",
    "gaierror": "nameless", "SSLError": "certificate",
}  # fmt: skip
LATE_SIGNS = {"TimeoutError": "slow", "TimeoutException": "slow", "Timeout": "slow", "ConnectionError": "cut", "TransportError": "cut"}
STATUSES = {401: "login", 403: "forbidden", 404: "missing", 429: "busy"}
ERRNOS = {
    errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EACCES: "unwritable", errno.EROFS: "unwritable",
    errno.ECONNREFUSED: "refused", errno.ENETUNREACH: "refused", errno.EHOSTUNREACH: "refused",
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One question to one hub."""

    hub: Hub
    kind: Kind
    name: str
    revision: str
    cache_dir: str | None
    token: str | None

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that all three libraries call alike."""
        return {"repo_type": self.kind, "revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def endpoint(self) -> str:
        """The hub's address, read now and not when its library was first imported."""
        hub = HUBS[self.hub]
        where = next((value for key in hub.endpoint_variables if (value := os.environ.get(key, "").strip())), hub.endpoint)
        return (where if "://" in where else f"https://{where}").rstrip("/")

    @property
    def host(self) -> str:
        """The address as it may be shown: a name and a password in it are nobody's business."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    @property
    def place(self) -> str:
        """The hub as it is told to the user."""
        return f"{HUBS[self.hub].title} ({self.host})"

    @property
    def page(self) -> str:
        """Where a browser finds it, without the protocol."""
        folder = "datasets/" if self.kind == "dataset" else "" if self.hub == "hf" else "models/"
        return f"{self.host}/{folder}{self.name}"

    def explain(self, trouble: str, facts: Mapping[str, str], troubles: Mapping[str, tuple[str, str]] = TROUBLES) -> tuple[str, str]:
        """What happened and what would do."""
        hub = HUBS[self.hub]
        words = dict(facts) | {
            "kind": self.kind, "revision": self.revision, "host": self.host, "page": self.page,
            "revision_key": "'model_revision'" if self.kind == "model" else "the revision", "offline": offline() or "HF_HUB_OFFLINE",
            "at_revision": "" if self.hub == "hf" else f" (or no revision {self.revision!r} of it)",
            "login": hub.login, "token_key": f"{self.hub}_hub_token",
            "endpoint_key": hub.endpoint_variables[0], "elsewhere": f"{hub.elsewhere}, or give a local folder",
        }  # fmt: skip
        what, advice = troubles[trouble]
        return what.format(**words), advice.format(**words)


def active_hub() -> Hub:
    """The hub that the environment chooses: USE_MODELSCOPE_HUB, then USE_OPENMIND_HUB, else Hugging Face."""
    return "ms" if is_on("USE_MODELSCOPE_HUB") else "om" if is_on("USE_OPENMIND_HUB") else "hf"


def fetch(
    name: str, *, kind: Kind, revision: str = "main", cache_dir: str | None = None, tokens: Mapping[Hub, str | None] = {},
    hub: Hub | None = None,
) -> Path:  # fmt: skip
    """The local folder of a model or data set; downloaded, or taken from the cache, if `name` is not a folder already."""
    if not name.strip():
        raise UserError(f"the name of the {kind} is empty; give a local folder or a hub's 'organisation/name'")
    folder = folder_of(name)
    if _is_folder(folder):
        return folder
    if is_path(name):
        raise UserError(_no_folder(folder))
    hub = hub or active_hub()
    branch = HUBS[hub].branch if revision == "main" else revision
    return _snapshot(Ask(hub, kind, name, branch, cache_dir, tokens.get(hub) or None))


def is_local(name: str) -> bool:
    """Whether a name is never asked of a hub: a folder of that name is there, or it can only be a path."""
    return is_path(name) or _is_folder(folder_of(name))


def folder_of(name: str) -> Path:
    """The local folder that a name would mean."""
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def is_path(name: str) -> bool:
    """Whether a name can only be a path: it is never asked of a hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _snapshot(ask: Ask) -> Path:
    """Download; where that cannot be, take what an earlier download left, if it is whole."""
    trouble, facts = "offline", {}
    if not offline():
        try:
            return _download_hf(ask) if ask.hub == "hf" else _download_marked(ask)
        except UserError:
            raise
        except Exception as error:  # three libraries with their own trees of exceptions: whatever they raise becomes one sentence
            trouble, facts = diagnose(error)
            get_logger(__name__).debug("what the library said", exc_info=error)
    copy, lack = (None, "") if trouble in ("revision", "unnamed") else _cached(ask)
    lack = "" if trouble in ("gated", *STATUSES.values()) else lack  # where the hub has answered, its answer is what matters
    what, advice = ask.explain(trouble, facts)
    if not copy:
        kind = UnknownName if trouble in ("missing", "unnamed", "offline") else UserError
        raise kind(f"the {ask.kind} {ask.name!r} cannot be fetched from {ask.place}: {what}{lack}; {advice}")
    if not offline():
        get_logger(__name__).warning(f"the {ask.kind} {ask.name!r} is taken from the cache, not from {ask.place}: {what}")
    return copy


def _download_hf(ask: Ask) -> Path:
    """A snapshot from Hugging Face, without the weights that it holds twice."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(endpoint=ask.endpoint, token=ask.token)
    describe = api.model_info if ask.kind == "model" else api.dataset_info
    # Asked here and not left to snapshot_download, which would wait without end for a hub that takes the call and says nothing.
    info = in_time(lambda: describe(ask.name, revision=ask.revision, timeout=PATIENCE_SECONDS))
    unwanted = _unwanted(ask.kind, [file.rfilename for file in info.siblings or []])
    return Path(snapshot_download(ask.name, endpoint=ask.endpoint, token=ask.token, ignore_patterns=unwanted, **ask.where))


def _download_marked(ask: Ask) -> Path:
    """A snapshot from ModelScope or openMind, marked when it is whole."""
    library = library_of(ask.hub, f"to fetch the {ask.kind} {ask.name!r}")
    contact(ask)
    mark = _mark(ask)
    with suppress(OSError):  # a cache that is only read gets no mark, and needs none while the hub answers
        mark.unlink(missing_ok=True)
    folder = Path(library.snapshot_download(repo_id=ask.name, token=ask.token, ignore_patterns=_unwanted(ask.kind, []), **ask.where))
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(os.path.relpath(folder.resolve(), mark.parent.resolve()), encoding="utf-8")
    return folder


def library_of(hub: Hub, purpose: str) -> ModuleType:
    """The package of ModelScope or openMind; raises `UserError` where it is not installed."""
    module, variable = ("modelscope", "USE_MODELSCOPE_HUB") if hub == "ms" else ("openmind_hub", "USE_OPENMIND_HUB")
    return need(module, f"{purpose}, as {variable} is set")


def _cached(ask: Ask) -> tuple[Path | None, str]:
    """What an earlier download left, or the reason why it cannot serve."""
    none, part = ", and the cache holds no complete copy", ", and the copy in the cache is incomplete (a download was interrupted)"
    if ask.hub != "hf":
        mark = _mark(ask)
        copy = mark.parent / mark.read_text(encoding="utf-8") if mark.is_file() else None
        return (copy.resolve(), "") if copy and copy.is_dir() else (None, none)
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    files: list[str] = []
    try:
        with suppress(CachedRepoTreeNotFoundError):  # a copy that an older huggingface_hub made
            files = [file.path for file in get_cached_repo_tree(ask.name, **ask.where)]
        copy = Path(snapshot_download(ask.name, ignore_patterns=_unwanted(ask.kind, files), local_files_only=True, **ask.where))
    except IncompleteSnapshotError:
        return None, part
    except (LocalEntryNotFoundError, HFValidationError):
        return None, none
    return (copy, "") if files or _has_all_shards(copy) else (None, part)


def _mark(ask: Ask) -> Path:
    """Where a finished download is noted: ModelScope and openMind take a half-filled folder for a whole one."""
    base = Path(ask.cache_dir or os.environ.get(HUBS[ask.hub].cache_variable) or HUBS[ask.hub].cache).expanduser()
    return base / ".finery-complete" / "--".join((ask.hub, ask.kind, ask.name, ask.revision)).replace("/", "--")


def _has_all_shards(folder: Path) -> bool:
    """Whether every file of weights is there that the indexes name; all that can be known without a list of the files."""
    shards = (set(re.findall(r'"([^"]+\.safetensors)"', index.read_text())) for index in folder.glob("*.safetensors.index.json"))
    return any(folder.iterdir()) and all((folder / shard).is_file() for names in shards for shard in names)


def _unwanted(kind: Kind, files: list[str]) -> list[str]:
    """Patterns of the files that nothing here would read."""
    has_safetensors = any(re.fullmatch(r"(adapter_)?model[^/]*\.safetensors", file) for file in files)
    return [] if kind == "dataset" else [*FOREIGN, *(DOUBLES if has_safetensors else ())]


def contact(ask: Ask) -> None:
    """Find out soon whether anybody is there, with the client of the hub's library: ModelScope itself would try for a minute."""
    if ask.hub == "hf":
        from huggingface_hub import get_session

        in_time(lambda: get_session().head(ask.endpoint, timeout=PATIENCE_SECONDS))
    else:
        in_time(lambda: need("requests").head(ask.endpoint, timeout=PATIENCE_SECONDS))


def in_time(work: Callable[[], T]) -> T:
    """First contact with a hub. In a thread, as a name look-up, or a host with ten addresses, outlasts what a client calls its timeout."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # carried over to the caller's thread
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=PATIENCE_SECONDS + 2)


def diagnose(error: BaseException, statuses: Mapping[int, str] = STATUSES) -> tuple[str, dict[str, str]]:
    """The key in TROUBLES that fits an exception of any of the libraries, and the facts its sentence needs."""
    chain = list(_chain(error))
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    told: list[Any] = [link for link in chain if "status_code" in vars(link)] + [vars(link).get("response") for link in chain]
    status = next((source.status_code for source in told if source is not None), 0)
    found = [trouble for sign, trouble in SIGNS.items() if sign in names]
    found += [ERRNOS[link.errno] for link in chain if isinstance(link, OSError) and link.errno in ERRNOS]
    found += [statuses[status]] if status in statuses else ["broken"] if status >= 500 else []
    found += [trouble for sign, trouble in LATE_SIGNS.items() if sign in names]
    answer = next((link for link in chain if "status_code" in vars(link) or vars(link).get("response") is not None), error)
    facts = {"status": str(status), "error": f"{type(error).__name__}: {_in_a_line(error)}", "answer": _in_a_line(answer)}
    return (found or ["odd"])[0], facts


def _in_a_line(error: BaseException) -> str:
    """What an exception says, shortened; an address in it without a name and a password."""
    return re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))[:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it; ModelScope keeps what led to failed files beside it, of which the first is taken."""
    for _ in range(30):  # a chain may be a ring
        if error is not None:
            yield error
            failed = vars(error).get("failed_files")
            error = next(iter(failed.values())) if failed else error.__cause__ or error.__context__


def _is_folder(path: Path) -> bool:
    return os.access(path, os.X_OK) and path.is_dir()  # is_dir alone raises where a folder above may not be entered


def _no_folder(folder: Path) -> str:
    """Says at which step a path leaves what is there."""
    there = next((parent for parent in folder.parents if _is_folder(parent)), Path())
    missing = folder.relative_to(there).parts[0]
    if _is_folder(there) and (there / missing).is_file():
        return f"{there / missing} is a file; a folder is needed here"
    near = suggestion(missing, [entry.name for entry in there.iterdir()] if os.access(there, os.R_OK) else [])
    where = "" if there == folder.parent else f" ({there.resolve()} has no {missing!r})"
    return f"there is no folder {folder}{where}{near}"


def offline() -> str:
    """The variable that forbids the network, if one does; it counts for every hub."""
    return next(
        (key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if is_on(key) or os.environ.get(key, "").lower() in ("yes", "on")), ""
    )
