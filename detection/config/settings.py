"""Settings: one frozen, typed class per workload, and one name in three spellings.

`SSD_BATCH_SIZE` in the environment (exported by config_*.sh) = `--batch-size` = `config.batch_size`. Flags override
the environment, which overrides the defaults. Only this module reads the environment.
It imports no torch, so that errors appear at once.
"""

import argparse
import difflib
import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mlperf.errors import InputError as InputError
from mlperf.errors import report_errors as report_errors

T = TypeVar("T")

TORCHRUN_PREFIXES = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Pydantic configuration of every settings class: no unknown fields, no NaN and no infinity."""


def setting(
    default: Any, *, help: str, unit: str = "", env: str = "", heading: str = "", formerly: str = "", **constraints: Any
) -> Any:
    """Declare one field of a settings class.

    help: meaning and source of the value. unit: unit of the value. env: name of its environment variable if that is
    not prefix + NAME. heading: starts a new section of `--help` at this field. formerly: earlier names, separated by
    spaces, for the message about an unknown setting. constraints: keywords of `pydantic.Field` (ge, le, gt, lt,
    pattern, min_length).
    """
    metadata: dict[str, Any] = {"unit": unit, "env": env, "heading": heading, "formerly": formerly}
    return Field(default, description=help, json_schema_extra=metadata, **constraints)


def _split_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _check_ascending(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if any(current <= previous for previous, current in itertools.pairwise(numbers)):
        raise ValueError("should be in ascending order")
    return numbers


AscendingInts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_commas), AfterValidator(_check_ascending)
]
"""Ascending integers of at least 1, written `44,55`."""


@dataclass(frozen=True)
class ResolvedSettings(Generic[T]):
    """Validated configuration with the source of each value."""

    config: T
    sources: Mapping[str, str]  # field -> "default", "SSD_BATCH_SIZE" or "--batch-size"


def resolve(
    cls: type[T],
    prefix: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
) -> ResolvedSettings[T]:
    """Build `cls`, a frozen pydantic dataclass, from its defaults, the environment and the flags in `argv`.

    prefix: prefix of the workload's variables, such as `SSD_`. A variable with this prefix that is not a field is
    rejected, and an empty one counts as unset. environ: environment of this process if None. presets: setting ->
    its value -> defaults of other settings under that value. Raises InputError with one line per error. Constraints
    between fields are checked only if each field is valid. `--help [TOPIC]` prints and exits.
    """
    environ = os.environ if environ is None else environ
    fields = _fields(cls)
    variables = {_env_name(prefix, name, field): name for name, field in fields.items()}
    if {"-h", "--help"} & set(argv):
        print(_format_help(cls, prefix, argv, environ))
        argparse.ArgumentParser().exit()
    flags, errors = _read_flags(_build_parser(cls, prefix, environ), argv, _former_names(fields))
    errors += _check_unknown_variables(prefix, environ, fields, variables)

    raw_values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    for variable, name in variables.items():
        if name in flags:
            raw_values[name], sources[name] = flags[name], _flag_name(name)
        elif environ.get(variable):
            raw_values[name], sources[name] = environ[variable], variable
    for name, choices in (presets or {}).items():
        for dependent, text in choices.get(str(raw_values.get(name)), {}).items():
            if dependent not in raw_values:
                raw_values[dependent], sources[dependent] = text, f"{name} {raw_values[name]}"

    values = {
        name: None if text == "none" and NoneType in get_args(fields[name].annotation) else text
        for name, text in raw_values.items()
    }
    try:
        config = cls(**values)
    except ValidationError as error:
        errors += _format_validation_errors(error, raw_values, sources)
    if errors:
        raise InputError("\n".join(errors))
    return ResolvedSettings(config, sources)


def format_settings(resolved: ResolvedSettings[Any], *, changed_only: bool = False) -> str:
    """Return the settings as a table of name, value with unit, and source.

    changed_only: omit the settings that nothing but the program's default determines.
    """
    rows = []
    for name, field in _fields(type(resolved.config)).items():
        if changed_only and resolved.sources[name] == "default":
            continue
        value = getattr(resolved.config, name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        unit = _metadata(field)["unit"]
        rows.append((name, f"{text or '-'} {unit}".rstrip(), resolved.sources[name]))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def flag_fields(argv: Sequence[str]) -> list[str]:
    """Return the fields that flags set, in the order of the flags: `--no-crop` sets crop."""
    flags = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")]
    return list(dict.fromkeys(flag.removeprefix("no-").replace("-", "_") for flag in flags))


def env_names(cls: type, prefix: str) -> dict[str, tuple[str, str]]:
    """Return the environment variable and the unit (may be empty) of each setting of a class."""
    return {name: (_env_name(prefix, name, field), _metadata(field)["unit"]) for name, field in _fields(cls).items()}


def to_json(config: Any) -> str:
    """Return a configuration as indented JSON, one field per line, in the order of the class."""
    return TypeAdapter(type(config)).dump_json(config, indent=2).decode()


@dataclass(frozen=True)
class RankInfo:
    """Position of this process among the ranks of a run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    has_launcher: bool = False
    """True if a launcher started this process."""
    num_restarts: int = 0
    """Number of times that the launcher restarted the ranks of this node."""
    launcher_pid: int = 0
    """Process ID of the launcher, or 0 if it did not give it."""

    @property
    def num_nodes(self) -> int:
        """Number of machines in the run, each with the same number of ranks."""
        return self.world_size // self.local_world_size


def read_rank_info(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Read the variables of the launcher (torchrun). A process without a launcher is the only rank.

    Raises InputError if a variable is not an integer or contradicts the others.
    """
    environ = os.environ if environ is None else environ
    world_size = _read_count(environ, "WORLD_SIZE", 1, minimum=1)
    rank_info = RankInfo(
        rank=_read_count(environ, "RANK", 0),
        local_rank=_read_count(environ, "LOCAL_RANK", 0),
        world_size=world_size,
        local_world_size=_read_count(environ, "LOCAL_WORLD_SIZE", world_size, minimum=1),
        has_launcher="TORCHELASTIC_RUN_ID" in environ,
        num_restarts=_read_count(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        launcher_pid=_read_count(environ, "LAUNCHER_PID", 0),
    )
    if rank_info.rank >= world_size or rank_info.local_rank >= rank_info.local_world_size:
        raise InputError(
            f"RANK={rank_info.rank} of WORLD_SIZE={world_size} and LOCAL_RANK={rank_info.local_rank} of "
            f"LOCAL_WORLD_SIZE={rank_info.local_world_size} is out of range. Unset all four."
        )
    return rank_info


def prepare_launch() -> int:
    """Name this process as the parent of the ranks, and return the script that started it, or 0.

    Remove variables that torchrun would take for its flags: schedulers set some of them for a torchrun of their own.
    An unknown LOGLEVEL would end torchrun.
    """
    script_pid = _read_count(os.environ, "LAUNCHER_PID", 0)
    for name in [name for name in os.environ if name.startswith(TORCHRUN_PREFIXES) or name == "LOGLEVEL"]:
        del os.environ[name]
    os.environ["LAUNCHER_PID"] = str(os.getpid())
    return script_pid


@dataclass(frozen=True)
class LaunchLayout:
    """Machines and ranks to launch, as set in config_*.sh. This machine has number `node_rank`."""

    num_nodes: int = 1
    ranks_per_node: int = 1
    node_rank: int = 0

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.num_nodes * self.ranks_per_node


def read_launch_layout(environ: Mapping[str, str] | None = None) -> LaunchLayout:
    """Read DGXNNODES, DGXNGPU and NODE_RANK. Raises InputError if one is not an integer or out of range."""
    environ = os.environ if environ is None else environ
    return LaunchLayout(
        num_nodes=_read_count(environ, "DGXNNODES", 1, minimum=1),
        ranks_per_node=_read_count(environ, "DGXNGPU", 1, minimum=1),
        node_rank=_read_count(environ, "NODE_RANK", 0),
    )


def _read_count(environ: Mapping[str, str], name: str, default: int, minimum: int = 0) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < minimum:
        raise InputError(f"{name}={text}: should be an integer of at least {minimum}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _format_help(cls: type, prefix: str, argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the help of all settings, or of the topic after `--help`. Raises InputError if there is no such topic."""
    words = [*argv, ""]
    topic = words[next(index for index, word in enumerate(words) if word in ("-h", "--help")) + 1].lower()
    parser = _build_parser(cls, prefix, environ)
    groups = {(group.title or "").lower(): group for group in parser._action_groups[2:]}
    if topic and not topic.startswith("-"):
        if topic not in groups:
            raise InputError(f"--help {topic}: unknown topic. Topics: {', '.join(groups)}")
        parser.description = parser.epilog = None
        parser._action_groups = [groups[topic]]
    else:
        parser.description = (
            f"{inspect.cleandoc(cls.__doc__ or '')}\n\n`--help TOPIC` shows one topic: {', '.join(groups)}."
        )
    return parser.format_help().strip()


def _build_parser(cls: type, prefix: str, environ: Mapping[str, str]) -> _Parser:
    """Build the parser of all flags. Its help shows the values of the environment as defaults."""
    parser = _Parser(
        usage=argparse.SUPPRESS,
        add_help=False,
        epilog=f"Flags override the environment ({prefix}* in config_*.sh), which overrides the program's defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
    )
    section: argparse._ActionsContainer = parser
    for name, field in _fields(cls).items():
        if heading := _metadata(field)["heading"]:
            section = parser.add_argument_group(heading)
        variable = _env_name(prefix, name, field)
        extras = (
            _metadata(field)["unit"],
            _format_range(field),
            f"default {environ.get(variable) or _format_default(field)}",
            variable,
        )
        text = f"{field.description} [{'; '.join(filter(None, extras))}]".replace("%", "%%")
        if field.annotation is bool:
            section.add_argument(_flag_name(name), help=text, action=argparse.BooleanOptionalAction)
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            section.add_argument(_flag_name(name), help=text, metavar="|".join(choices) or "VALUE")
    return parser


def _former_names(fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    return {former: name for name, field in fields.items() for former in _metadata(field)["formerly"].split()}


def _read_flags(
    parser: _Parser, argv: Sequence[str], former_names: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    try:
        known, remaining = parser.parse_known_args(argv)
    except InputError as error:
        return {}, [str(error)]
    names = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    unknown = [word for word in remaining if word.startswith("-")]
    errors = []
    for word in unknown:
        flag = word.split("=")[0]
        former = former_names.get(flag.removeprefix("--").removeprefix("no-").replace("-", "_"))
        name = flag.removeprefix("--")
        suggestions = [former] if former else difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {_flag_name(suggestions[0])}?" if suggestions else "See --help for all flags."
        errors.append(f"{word}: unknown setting. {hint}")
    if remaining and not unknown:
        errors.append(
            f"{' '.join(remaining)}: unexpected argument. Pass settings as --name value. See --help for all flags."
        )
    return vars(known), errors


def _check_unknown_variables(
    prefix: str, environ: Mapping[str, str], fields: Mapping[str, FieldInfo], variables: Mapping[str, str]
) -> list[str]:
    # Compare names without the prefix, which would make all of them similar. Include the fields with another
    # variable (DATADIR), since users may try the prefix.
    names = {name.upper(): _env_name(prefix, name, field) for name, field in fields.items()}
    former_names = {former.upper(): names[name.upper()] for former, name in _former_names(fields).items()}
    errors = []
    for word in sorted(environ):
        if word.startswith(prefix) and word not in variables:
            name = word.removeprefix(prefix)
            suggestions = [names[close] for close in difflib.get_close_matches(name, names, n=1)]
            suggestion = former_names.get(name) or next(iter(suggestions), "")
            hint = f"Did you mean {suggestion}?" if suggestion else "Unset it. See --help for all names."
            errors.append(f"{word}={environ[word]}: unknown setting. {hint}")
    return errors


def _format_validation_errors(
    error: ValidationError, raw_values: Mapping[str, Any], sources: Mapping[str, str]
) -> list[str]:
    messages = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        message = str(cause) if cause else detail["msg"].replace("Input should", "should")
        if detail["loc"]:
            name = str(detail["loc"][0])
            message = f"{sources[name]}={raw_values[name]}: {message}"
        messages.append(message)
    return messages


def _fields(cls: type) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = vars(cls)["__pydantic_fields__"]
    return fields


def _metadata(field: FieldInfo) -> dict[str, str]:
    metadata = field.json_schema_extra
    assert isinstance(metadata, dict), "every field must be declared with setting()"
    return metadata  # type: ignore[return-value]


def _env_name(prefix: str, name: str, field: FieldInfo) -> str:
    return _metadata(field)["env"] or prefix + name.upper()


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _format_default(field: FieldInfo) -> str:
    value = field.default
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)) or '""'


def _format_range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return ", ".join(bounds)
