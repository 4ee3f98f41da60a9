"""What there is to know of every method before one is chosen, from its own file."""

import re
import sys
from dataclasses import dataclass
from inspect import getdoc

from layershare.methods import METHODS, make_method


@dataclass(frozen=True)
class Entry:
    """A method: its paper (`None`: older than this literature), what it does in a line, and what it needs.

    `text` to calibrate on, `gradients` of the loss, the `whole_model` in memory, `training` afterwards; `sizes` that it
    can reach. All of that with the method's default options.
    """

    name: str
    paper: str | None
    does: str
    text: bool
    gradients: bool
    whole_model: bool
    training: bool
    sizes: str

    @property
    def needs(self) -> str:
        """What it needs, in words."""
        words = {
            "a text": self.text,
            "gradients": self.gradients,
            "the whole model in memory": self.whole_model,
            "training afterwards": self.training,
        }
        return " and ".join(word for word, needed in words.items() if needed) or "no text"


def catalogue() -> list[Entry]:
    """All methods."""
    return [_entry(name) for name in METHODS]


def paper_of(name: str) -> str | None:
    """The paper that a method's file names: authors, title, place, arXiv number."""
    found = re.search(r"^Paper: (.*?arXiv\s[\d.]+\d)", _documented(name), re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else None


def _entry(name: str) -> Entry:
    method = make_method(name)
    whole_model = "fisher" in method.uses
    return Entry(
        name=name,
        paper=paper_of(name),
        does=_does(name),
        text=method.reads_text,
        gradients=whole_model or "gradients" in method.uses,
        whole_model=whole_model or method.searches,
        training=method.wants_training,
        sizes=method.sizes,
    )


def _does(name: str) -> str:
    """The first line of a method's file, or of its class where the file has several methods."""
    kind = METHODS[name]
    if sum(each.__module__ == kind.__module__ for each in METHODS.values()) > 1:
        line = (getdoc(kind) or "").partition("\n")[0]
    else:
        line = _documented(name).partition("\n\n")[0]
    return " ".join(line.split())


def _documented(name: str) -> str:
    return sys.modules[METHODS[name].__module__].__doc__ or ""
