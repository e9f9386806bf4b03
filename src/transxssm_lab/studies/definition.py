"""The definition of a study: a YAML file that says which models are trained, how often, on what, and how they are compared."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

from transxssm.data import AlgorithmicTask, RecallTask
from transxssm.data.needle import NUM_NAMES
from transxssm.training.schema import apply_override, bundled, read_document, validated
from transxssm.wording import nearest

# Numbers are strict: the text "1" is refused. Sections are mappings, which become the dataclasses.
_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CLOSED)
class Grid:
    """The seeds and learning rates over which the cells are repeated.

    Args:
        title: the question that the study asks.
        seeds: seeds of initialisation and data order. Every contender is trained once with each.
        learning_rates: every contender is trained with each rate, and its best is compared. Defaults to the rate that `tuning` finds, or
            else to that of `training`.
        repeat_rates: the rates with which the seeds after the first are trained: "all", or the "best" rate of the first seed.
        flops_per_second: expected rate of the machine, for an estimate of the time before anything has been measured.
        output_dir: folder of the study. Defaults to runs/studies/<name>.
    """

    title: str = ""
    seeds: list[StrictInt] = dataclasses.field(default_factory=lambda: [0])
    learning_rates: list[StrictFloat] = dataclasses.field(default_factory=list)
    repeat_rates: Literal["all", "best"] = "all"
    flops_per_second: StrictFloat = 1e11
    output_dir: str | None = None


@dataclass(frozen=True, config=_CLOSED)
class Tuning:
    """Chooses each contender's learning rate: the one with the lowest held-out loss after short runs of `max_steps` steps."""

    learning_rates: list[StrictFloat]
    max_steps: StrictInt
    seed: StrictInt = 0


@dataclass(frozen=True, config=_CLOSED)
class Cell:
    """One model of the comparison.

    Args:
        model: keys of a recipe's model section, which override those that all cells share.
        weights_of: another cell, whose trained weights are evaluated with these model keys. Nothing is trained.
        row, column: the place of the cell in a two-way table.
        slowdown: expected time divided by the time that its FLOPs suggest.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights_of: str | None = None
    row: str | None = None
    column: str | None = None
    slowdown: StrictFloat = 1.0


@dataclass(frozen=True, config=_CLOSED)
class Size:
    """Keys of the model and training sections that set the size of every cell."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_CLOSED)
class Perplexity:
    """Perplexity of held-out documents at least as long as the longest window, in windows of each length that overlap by half."""

    lengths: list[StrictInt]
    max_tokens: StrictInt = 200_000


@dataclass(frozen=True, config=_CLOSED)
class Recall:
    """Multi-query associative recall, on which models are trained and evaluated in place of text.

    Args:
        sizes: length and number of pairs of each task. Training alternates between the tasks.
        vocab_size: vocabulary size of the tasks.
        tokens_per_step: tokens in a training step, which reads sequences of one task.
        held_out_steps: batches of the held-out loss.
        num_examples: sequences on which the accuracy at each size is measured.
    """

    sizes: list[list[StrictInt]]
    vocab_size: StrictInt = 8192
    tokens_per_step: StrictInt = 16384
    held_out_steps: StrictInt = 16
    num_examples: StrictInt = 256

    @property
    def train_lengths(self) -> list[int]:
        """Tokens in each task's sequences."""
        return [length for length, _ in self.sizes]


@dataclass(frozen=True, config=_CLOSED)
class Algorithmic:
    """A task with exact answers at any length (`AlgorithmicTask`) to train on and be measured by, in place of text.

    Args:
        task: its name.
        train_elements: elements or letters of a sequence; training takes turns.
        lengths: elements or letters at which it is measured.
        tokens_per_step: tokens in a training step, which reads sequences of one length.
        held_out_steps: batches of the held-out loss.
        num_examples: sequences that the accuracy at each length is measured on.
    """

    task: str
    train_elements: list[StrictInt]
    lengths: list[StrictInt]
    tokens_per_step: StrictInt = 4096
    held_out_steps: StrictInt = 8
    num_examples: StrictInt = 512

    @property
    def train_lengths(self) -> list[int]:
        """Tokens of each length's sequences."""
        return [AlgorithmicTask(self.task, length).num_tokens for length in self.train_elements]


@dataclass(frozen=True, config=_CLOSED)
class Needle:
    """Needles in haystacks of the data section's text, for training and evaluation: a sentence states a number, which is asked for.

    Args:
        train_lengths: largest numbers of tokens in an example. Training alternates between the lengths.
        lengths, depths: the lengths and depths of the evaluation. A depth is the share of the text before the needle.
        tokens_per_step: tokens in a training step, which reads examples of one length.
        tokens_per_needle: a text for training holds one needle for every so many tokens, all of which are asked for at its end. Defaults to
            one needle in a text, as in the evaluation.
        held_out_steps: batches of the held-out loss.
        num_examples: number of examples at each length and depth.
    """

    train_lengths: list[StrictInt]
    lengths: list[StrictInt]
    depths: list[StrictFloat] = dataclasses.field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    tokens_per_step: StrictInt = 16384
    tokens_per_needle: StrictInt | None = None
    held_out_steps: StrictInt = 16
    num_examples: StrictInt = 32


@dataclass(frozen=True, config=_CLOSED)
class Study:
    """A checked study. `model`, `data` and `training` are sections of a recipe that all cells share."""

    name: str = dataclasses.field(metadata={"is_own": True})  # taken from the file's name, not from its contents
    cells: dict[str, Cell]
    grid: Grid = dataclasses.field(default_factory=Grid)
    tuning: Tuning | None = None
    sizes: dict[str, Size] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    perplexity: Perplexity | None = None
    recall: Recall | None = None
    algorithmic: Algorithmic | None = None
    needle: Needle | None = None

    @property
    def task(self) -> Recall | Algorithmic | Needle | None:
        """The task on which models are trained in place of text, if there is one."""
        return self.recall or self.algorithmic or self.needle

    @property
    def output_dir(self) -> Path:
        """The folder of the study."""
        return Path(self.grid.output_dir or f"runs/studies/{self.name}").expanduser()

    def settings(self) -> dict[str, Any]:
        """Every setting on which a result depends, as plain values."""
        settings = dataclasses.asdict(self)
        for key in ("title", "flops_per_second", "output_dir"):
            del settings["grid"][key]
        if self.grid.repeat_rates == "all":  # left out, so that the settings of older studies compare equal
            del settings["grid"]["repeat_rates"]
        if self.algorithmic is None:  # as in studies before there was the section
            del settings["algorithmic"]
        for cell in settings["cells"].values():
            del cell["slowdown"]
        return settings


def bundled_studies() -> list[str]:
    """Names of the studies that the package contains."""
    return bundled("transxssm_lab")


def load_study(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study and applies overrides `section.key=value`.

    A study may extend another: `base: NAME` takes over its keys, which the study can override. The value null removes a key.

    Raises:
        ValueError: there is no such study, a key is unknown (the message names the nearest known one), or a value does not fit. The message
            is one line.
    """
    name, sections = _sections_of(str(name_or_path))
    for override in overrides:
        apply_override(override, sections)
    if "name" in sections:
        raise ValueError("unknown section name: a study has the name of its file")
    study: Study = validated(Study, _without_nulls(sections) | {"name": name}, "study", also_known=("base",))
    _check(study)
    return study


def study_from_settings(name: str, title: str, settings: Mapping[str, Any]) -> Study:
    """The study with these settings (see `Study.settings`), as a report records them.

    Raises:
        ValueError: this version does not know one of the settings.
    """
    sections = {**settings, "grid": {**settings["grid"], "title": title}, "name": name}
    study: Study = validated(Study, sections, "study")
    _check(study)
    return study


def meant(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, and all known names, for an error message."""
    known = list(known)
    close = nearest(name, known)
    return f"{f'did you mean {close}? ' if close else ''}Expected one of {', '.join(known)}"


def _sections_of(name_or_path: str, heirs: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """A study's name, and its sections merged over those of its `base`. `heirs` are the studies that extend this one."""
    name, sections = read_document("study", "transxssm_lab", name_or_path, _sections())
    base = sections.pop("base", None)
    if base is None:
        return name, sections
    if not isinstance(base, str):
        raise ValueError(f"{name_or_path}: base: got {base!r}, expected the name or the file of a study")
    if name_or_path not in bundled_studies():  # resolved, so that a file has one name and a circle is found
        name_or_path = str(Path(name_or_path).expanduser().resolve())
        beside = Path(name_or_path).parent / Path(base).expanduser()
        base = str(beside.resolve()) if base not in bundled_studies() and beside.is_file() else base
    if base in (name_or_path, *heirs):
        raise ValueError(f"{name_or_path}: base: {base} stands on this study itself")
    return name, _over(_sections_of(base, (name_or_path, *heirs))[1], sections)


def _over(below: Any, above: Any) -> Any:
    """Merges nested mappings: the keys of `above` override those of `below`."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def _without_nulls(values: Any) -> Any:
    """A nested mapping without the keys whose value is null, so that these have their defaults."""
    if not isinstance(values, dict):
        return values
    return {key: _without_nulls(value) for key, value in values.items() if value is not None}


def _check(study: Study) -> None:
    if not study.cells:
        raise ValueError("cells: expected at least one cell")
    if not study.grid.seeds or len(set(study.grid.seeds)) < len(study.grid.seeds):
        raise ValueError(f"grid.seeds: got {study.grid.seeds}, expected at least one seed, none twice")
    if study.tuning is not None and study.grid.learning_rates:
        raise ValueError(
            "tuning and grid.learning_rates both name learning rates: tuning picks one on short runs, grid.learning_rates trains all "
            "to the end; leave one out"
        )
    if study.tuning is not None and not study.tuning.learning_rates:
        raise ValueError("tuning.learning_rates: expected at least one rate")
    if study.tuning is not None and study.tuning.max_steps < 1:
        raise ValueError(f"tuning.max_steps: got {study.tuning.max_steps}, expected at least 1")
    for where, rates in (
        ("grid", study.grid.learning_rates),
        ("tuning", [] if study.tuning is None else study.tuning.learning_rates),
    ):
        if len(set(rates)) < len(rates):
            raise ValueError(f"{where}.learning_rates: got {rates}, expected none twice")
    if study.grid.repeat_rates == "best" and not study.grid.learning_rates:
        raise ValueError("grid.repeat_rates: got 'best', expected several grid.learning_rates to choose from")
    for name in (*study.cells, *study.sizes):
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{name!r} names no folder: expected letters, digits, - and _")
    for name, cell in study.cells.items():
        if cell.weights_of is None:
            continue
        if cell.weights_of not in study.cells:
            raise ValueError(
                f"cells.{name}.weights_of: no cell {cell.weights_of!r}: {meant(cell.weights_of, study.cells)}"
            )
        if study.cells[cell.weights_of].weights_of is not None:
            raise ValueError(
                f"cells.{name}.weights_of: {cell.weights_of} has no weights of its own: name a cell that is trained"
            )
        if study.perplexity is None and study.task is None:
            raise ValueError(
                f"cells.{name}.weights_of: such a cell is measured, not trained: add a section perplexity, recall, algorithmic or needle"
            )
    if sum(section is not None for section in (study.perplexity, study.recall, study.algorithmic, study.needle)) > 1:
        raise ValueError(
            "a study is measured by one of perplexity, recall, algorithmic and needle: got more than one section"
        )
    if study.algorithmic is not None:
        _check_algorithmic(study.algorithmic)
    if study.needle is not None:
        _check_needle(study.needle)
    if study.recall is not None:
        for size in study.recall.sizes:
            if len(size) != 2:
                raise ValueError(f"recall.sizes: got {size}, expected [length, pairs]")
            RecallTask(
                length=size[0], num_pairs=size[1], vocab_size=study.recall.vocab_size
            )  # raises for invalid sizes


def _check_algorithmic(section: Algorithmic) -> None:
    if not (section.train_elements and section.lengths):
        raise ValueError("algorithmic: expected at least one of train_elements and lengths each")
    for length in (*section.train_elements, *section.lengths):
        AlgorithmicTask(section.task, length)  # refuses what cannot be
    if section.num_examples < 1 or section.held_out_steps < 1:
        raise ValueError(
            "algorithmic: expected num_examples and held_out_steps of at least 1: "
            f"got {section.num_examples} and {section.held_out_steps}"
        )


def _check_needle(needle: Needle) -> None:
    if not (needle.train_lengths and needle.lengths and needle.depths):
        raise ValueError("needle: expected at least one of train_lengths, lengths and depths each")
    for depth in needle.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"needle.depths: expected shares from 0 (the beginning) to 1 (the end): got {depth}")
    if needle.tokens_per_needle is not None:
        most = max(needle.train_lengths) // max(1, needle.tokens_per_needle)
        if needle.tokens_per_needle < 1 or most > NUM_NAMES:
            raise ValueError(
                f"needle.tokens_per_needle: expected 1 or more, and at most {NUM_NAMES} needles a text: got {needle.tokens_per_needle}"
            )
    if needle.num_examples < 1 or needle.held_out_steps < 1:
        raise ValueError(
            f"needle: expected num_examples and held_out_steps of at least 1: got {needle.num_examples} and {needle.held_out_steps}"
        )


def _sections() -> list[str]:
    return ["base", *(field.name for field in dataclasses.fields(Study) if field.name != "name")]
