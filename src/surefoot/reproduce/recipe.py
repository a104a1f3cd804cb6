"""What a recipe is: a paper's claim, how it is tested, and the rule that decides, all fixed before the first run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from json import dumps
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surefoot.data import Dataset
    from surefoot.reproduce.results import Results

Outcome = Literal["reproduced", "not reproduced", "not testable here"]
Arms = Mapping[str, Mapping[str, Any]]  # arm -> measure -> number, word, list of numbers or None


@dataclass(frozen=True)
class Setting:
    """A hyper-parameter and where it comes from.

    Attributes:
        name: of the hyper-parameter.
        value: scaled down, in words.
        full: in the full size; "" where it is the same.
        source: the paper, a public script, or "ours" with the reason.
    """

    name: str
    value: str
    source: str
    full: str = ""


@dataclass(frozen=True)
class Experiment:
    """One line of the result: a data set and all that is done with it, in JSON values.

    Attributes:
        name: short, for `--only` and the table.
        data: as `surefoot train --data` takes it: "digits" or a hub id; "" where no public home can be loaded from.
        local: where it may lie under `--data-root`, the first that is there counting; () for built-in data.
        options: keyword arguments of `surefoot.data.load`.
        setting: whatever the recipe's `run` needs to know.
        parts: pieces that are run and kept one by one, such as optimizers; ("",) for a single one.
    """

    name: str
    data: str = ""
    local: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("",)

    def digest(self) -> str:
        """Return a hash of all that decides the numbers but the data themselves."""
        what = {"data": self.data, "options": dict(self.options), "setting": dict(self.setting)}
        return blake2b(dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Job:
    """What a recipe's `run` is given.

    Attributes:
        experiment: which.
        part: which part of it.
        seed: 0, 1, ...; whatever is drawn follows from it.
        data: loaded; None where the experiment names none.
        device: "cpu" or another.
        progress: to be told now and then how far it is, such as "step 300 of 1000"; most of it is not printed.
    """

    experiment: Experiment
    part: str
    seed: int
    data: Dataset | None
    device: str = "cpu"
    progress: Callable[[str], object] = lambda _: None


@dataclass(frozen=True)
class Column:
    """A column of a table: the measure, its title, and a format of its mean and standard error, such as ".2%"."""

    measure: str
    title: str
    form: str = ".4g"


@dataclass(frozen=True)
class Table:
    """A table of the report, one row an experiment and arm.

    Attributes:
        title: its heading.
        columns: measures; a column that no row has is left out.
        arms: these only, in this order; () for all, as they come. The name of a single one is not shown.
    """

    title: str
    columns: tuple[Column, ...]
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What came of one part of the claim."""

    what: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: `paint` fills an empty figure of `inches` (width, height)."""

    name: str
    caption: str
    paint: Callable[[Figure, Results], None]
    inches: tuple[float, float] = (8.0, 4.5)


@dataclass(frozen=True)
class Recipe:
    """A paper's experiment.

    Attributes:
        name: as in `surefoot reproduce NAME`, and of its folder in reproductions/.
        paper: authors, title, where.
        claim: what is tested, in a sentence or two.
        scaled: what a small machine can do of it, and how long that takes.
        tolerance: the rule by which `judge` decides, in words. Fixed before the run.
        settings: each hyper-parameter with its source.
        experiments: the default, scaled down.
        full: the same at the paper's size.
        run: (job) -> numbers by arm. A pure function of the job, on as many threads as torch has been given.
        judge: (results) -> findings. The claim is reproduced where each finding that is testable says so.
        tables: of the report.
        drawings: figures of the report.
        seeds: how many by default.
        folder: in reproductions/, where several recipes share one; their results lie in results/NAME. "": the name.
    """

    name: str
    paper: str
    claim: str
    scaled: str
    tolerance: str
    settings: tuple[Setting, ...]
    experiments: tuple[Experiment, ...]
    full: tuple[Experiment, ...]
    run: Callable[[Job], Arms]
    judge: Callable[[Results], list[Finding]]
    tables: tuple[Table, ...]
    drawings: tuple[Drawing, ...] = ()
    seeds: int = 5
    folder: str = ""


def overall(findings: list[Finding]) -> Outcome:
    """Return what the findings come to together: what cannot be tested here decides nothing."""
    told = {f.outcome for f in findings} - {"not testable here"}
    if not told:
        return "not testable here"
    return "not reproduced" if "not reproduced" in told else "reproduced"
