"""Settings: one frozen, typed class per benchmark; one name in three spellings.

`SSD_BATCH_SIZE` in the environment (config_*.sh exports it) = `--batch-size` = `config.batch_size`. Defaults
give way to the environment, the environment to flags. This is the only module that reads the environment,
and it imports no torch, so that a mistake is answered at once.
"""

import argparse
import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""For the settings class of a benchmark: nothing unknown, and no number that is none."""


class InputError(ValueError):
    """A user's mistake: the message says what is wrong, where, and what to do. `__main__` exits with 2."""


def setting(default: Any, *, help: str, unit: str = "", env: str = "", heading: str = "", **constraints: Any) -> Any:
    """Declare one field of a settings class.

    help: what it is and where it comes from. unit: of the value. env: its name in the environment where that
    is not prefix + NAME. heading: opens a new section of `--help` at this field. constraints: those of
    `pydantic.Field` (ge, le, gt, lt, pattern, min_length).
    """
    note: dict[str, Any] = {"unit": unit, "env": env, "heading": heading}
    return Field(default, description=help, json_schema_extra=note, **constraints)


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _ascend(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise ValueError("should ascend")
    return numbers


Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split), AfterValidator(_ascend)]
"""Whole numbers from 1 up, ascending, written `44,55`."""


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A checked configuration, and for each field where its value came from."""

    config: T
    sources: Mapping[str, str]  # field -> "default", "SSD_BATCH_SIZE" or "--batch-size"


def resolve(
    cls: type[T],
    prefix: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    usage: str | None = None,
    presets: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
) -> Resolved[T]:
    """Build `cls`, a frozen pydantic dataclass, from its defaults, the environment and the flags in `argv`.

    prefix: of the benchmark's variables, such as `SSD_`; one that is no field is refused. An empty variable
    counts as unset. environ: the process's own where None. presets: of a setting and its value, what other settings
    are then where they are not given. Raises InputError with every mistake found, a line
    each; what lies between fields is checked once each is right by itself. `--help` prints and exits.
    """
    environ = os.environ if environ is None else environ
    fields = _fields(cls)
    variables = {_variable(prefix, name, field): name for name, field in fields.items()}
    flags, mistakes = _read_flags(_parser(cls, prefix, usage), argv)
    mistakes += _unknown_variables(prefix, environ, fields, variables)

    texts: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    for variable, name in variables.items():
        if name in flags:
            texts[name], sources[name] = flags[name], _flag(name)
        elif environ.get(variable):
            texts[name], sources[name] = environ[variable], variable
    for name, choices in (presets or {}).items():
        for follower, text in choices.get(str(texts.get(name)), {}).items():
            if follower not in texts:
                texts[follower], sources[follower] = text, f"{name} {texts[name]}"

    values = {
        name: None if text == "none" and NoneType in get_args(fields[name].annotation) else text
        for name, text in texts.items()
    }
    try:
        config = cls(**values)
    except ValidationError as error:
        mistakes += _explain(error, texts, sources)
    if mistakes:
        raise InputError("\n".join(mistakes))
    return Resolved(config, sources)


def describe(resolved: Resolved[Any]) -> str:
    """Lay out the settings as a table: name, value with its unit, source."""
    rows = []
    for name, field in _fields(type(resolved.config)).items():
        value = getattr(resolved.config, name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        unit = _note(field)["unit"]
        rows.append((name, f"{shown or '-'} {unit}".rstrip(), resolved.sources[name]))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{wide[0]}}  {value:<{wide[1]}}  {source}" for name, value, source in rows)


def names(cls: type, prefix: str) -> dict[str, tuple[str, str]]:
    """Of each setting of a class, its name in the environment and the unit of its value, which may be empty."""
    return {name: (_variable(prefix, name, field), _note(field)["unit"]) for name, field in _fields(cls).items()}


def to_json(config: Any) -> str:
    """Write a configuration as indented JSON, one field a line, in the order of the class."""
    return TypeAdapter(type(config)).dump_json(config, indent=2).decode()


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the ranks of a run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher started it, and not a person or a script."""
    restarts: int = 0
    """How often the launcher has started the ranks of this node again."""

    @property
    def nodes(self) -> int:
        """Machines in the run, each with as many ranks."""
        return self.world_size // self.local_world_size


def read_topology(environ: Mapping[str, str] | None = None) -> Topology:
    """Read what the launcher (torchrun) told this process; a process started by hand is alone.

    Raises InputError where a variable is no whole number or contradicts the others.
    """
    environ = os.environ if environ is None else environ
    world_size = _count(environ, "WORLD_SIZE", 1, least=1)
    topology = Topology(
        rank=_count(environ, "RANK", 0),
        local_rank=_count(environ, "LOCAL_RANK", 0),
        world_size=world_size,
        local_world_size=_count(environ, "LOCAL_WORLD_SIZE", world_size, least=1),
        launched="TORCHELASTIC_RUN_ID" in environ,
        restarts=_count(environ, "TORCHELASTIC_RESTART_COUNT", 0),
    )
    if topology.rank >= world_size or topology.local_rank >= topology.local_world_size:
        raise InputError(
            f"RANK={topology.rank} of WORLD_SIZE={world_size} and LOCAL_RANK={topology.local_rank} of "
            f"LOCAL_WORLD_SIZE={topology.local_world_size} cannot be: unset them all"
        )
    return topology


@dataclass(frozen=True)
class System:
    """The machines a run is to be started on, as config_*.sh says; this one is number `node_rank`."""

    nodes: int = 1
    ranks_per_node: int = 1
    node_rank: int = 0

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


def read_system(environ: Mapping[str, str] | None = None) -> System:
    """Read DGXNNODES, DGXNGPU and NODE_RANK; raises InputError where one is no number or out of range."""
    environ = os.environ if environ is None else environ
    return System(
        nodes=_count(environ, "DGXNNODES", 1, least=1),
        ranks_per_node=_count(environ, "DGXNGPU", 1, least=1),
        node_rank=_count(environ, "NODE_RANK", 0),
    )


def _count(environ: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text}: should be a whole number, at least {least}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser(cls: type, prefix: str, usage: str | None) -> _Parser:
    parser = _Parser(
        usage=usage,
        description=cls.__doc__,
        epilog=f"Defaults give way to the environment ({prefix}* in config_*.sh), the environment to flags.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    section: argparse._ActionsContainer = parser
    for name, field in _fields(cls).items():
        if heading := _note(field)["heading"]:
            section = parser.add_argument_group(heading)
        extras = (
            _note(field)["unit"],
            _range(field),
            f"default {_default(field)}",
            _variable(prefix, name, field),
        )
        text = f"{field.description} [{'; '.join(filter(None, extras))}]".replace("%", "%%")
        if field.annotation is bool:
            section.add_argument(_flag(name), help=text, action=argparse.BooleanOptionalAction)
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            section.add_argument(_flag(name), help=text, metavar="|".join(choices) or "VALUE")
    return parser


def _read_flags(parser: _Parser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    try:
        known, rest = parser.parse_known_args(argv)
    except InputError as error:
        return {}, [str(error)]
    flags = [option for action in parser._actions for option in action.option_strings]
    unknown = [word for word in rest if word.startswith("-")]
    mistakes = []
    for word in unknown:
        nearest = difflib.get_close_matches(word.split("=")[0], flags, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists them"
        mistakes.append(f"{word}: no such flag; {hint}")
    if rest and not unknown:
        mistakes.append(f"{' '.join(rest)}: settings are given as --name value, --help lists them")
    return vars(known), mistakes


def _unknown_variables(
    prefix: str, environ: Mapping[str, str], fields: Mapping[str, FieldInfo], variables: Mapping[str, str]
) -> list[str]:
    # Compared without the prefix, which would make every two names alike; a field whose variable has a name
    # of its own (DATADIR) may be looked for under the prefix.
    names = {name.upper(): _variable(prefix, name, field) for name, field in fields.items()}
    mistakes = []
    for word in sorted(environ):
        if word.startswith(prefix) and word not in variables:
            nearest = difflib.get_close_matches(word.removeprefix(prefix), names, n=1)
            hint = f"did you mean {names[nearest[0]]}?" if nearest else "unset it; --help lists the names"
            mistakes.append(f"{word}={environ[word]}: no such setting; {hint}")
    return mistakes


def _explain(error: ValidationError, texts: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    mistakes = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        message = str(cause) if cause else detail["msg"].replace("Input should", "should")
        if detail["loc"]:
            name = str(detail["loc"][0])
            message = f"{sources[name]}={texts[name]}: {message}"
        mistakes.append(message)
    return mistakes


def _fields(cls: type) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = vars(cls)["__pydantic_fields__"]
    return fields


def _note(field: FieldInfo) -> dict[str, str]:
    note = field.json_schema_extra
    assert isinstance(note, dict), "every field is declared with setting()"
    return note  # type: ignore[return-value]


def _variable(prefix: str, name: str, field: FieldInfo) -> str:
    return _note(field)["env"] or prefix + name.upper()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(field: FieldInfo) -> str:
    value = field.default
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)) or '""'


def _range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return ", ".join(bounds)
