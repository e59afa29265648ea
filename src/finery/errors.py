"""What can go wrong that a user can mend; all else is a bug and crashes loudly."""

from collections.abc import Iterable


class UserError(Exception):
    """One or several complaints, a line each; printed without a traceback, exit code 2."""

    def __init__(self, *complaints: str) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = list(complaints)

    @classmethod
    def raise_any(cls, complaints: Iterable[str]) -> None:
        """Raise all complaints at once, each once, in the order given; do nothing where there are none."""
        if once := list(dict.fromkeys(complaints)):
            raise cls(*once)


class Complaint(str):
    """A line about a key, which knows its place and which keys it is about (or perhaps meant)."""

    source: str
    about: frozenset[str]
    follows: bool

    def __new__(cls, text: str, source: str = "", about: Iterable[str] = (), follows: bool = False) -> "Complaint":
        """`source` is `x.yaml:7`, `command line`, `Python` or nothing; one that `follows` is left out where another explains it."""
        line = super().__new__(cls, f"{source}: {text}" if source else text)
        line.source, line.about, line.follows = source, frozenset(about), follows
        return line


def in_order(complaints: Iterable[Complaint]) -> list[Complaint]:
    """Each complaint once: those with a line first, as the file goes, then the command line's, then those without a place."""

    def place(complaint: Complaint) -> tuple[int, int]:
        line = complaint.source.rpartition(":")[2]
        return (0, int(line)) if line.isdigit() else (1 if complaint.source else 2, 0)

    return sorted(dict.fromkeys(complaints), key=place)


def suggestion(word: str, known: Iterable[str]) -> str:
    """` did you mean 'x'?` for the nearest of `known`, or nothing."""
    near = nearest(word, sorted(known))
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most alike of `known` where one is alike; capitals do not count, and of equals the first is taken."""
    from difflib import get_close_matches

    names = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), names, n=1, cutoff=0.7)
    return names[near[0]] if near else None


class Stopped(KeyboardInterrupt):
    """A run has ended because it was told to; `saved` says whether it can be gone on with from where it was."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.saved = saved
