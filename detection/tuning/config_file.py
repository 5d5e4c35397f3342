"""The config file of a system, config_NAME.sh, written out of settings."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from detection.atomic_file import writing
from detection.checkpoint.backbone_urls import BACKBONE_FILES
from detection.config.run_config import RunConfig
from detection.config.settings import Resolved, System, names

# Of one run, and not of a system.
OF_A_RUN = {
    *("mode", "checkpoint", "benchmark_input", "benchmark_steps", "benchmark_warmup", "data_dir", "log_dir", "run_dir"),
    *("resume", "max_steps", "experiment", "summary", "seed", "system", "platform", "page_cache_dropped"),
}


@dataclass(frozen=True)
class SystemFile:
    """What a config file says.

    title: what the system is. remarks: lines of comment. walltime_s: what a scheduler is asked for. always: settings
    that are written even where they have their default.
    """

    title: str
    remarks: Sequence[str]
    system: System
    walltime_s: float
    always: Sequence[str] = ()

    def write(self, path: Path, resolved: Resolved[Any], prefix: str) -> None:
        """Write the settings that are no default, each with its unit."""
        config: RunConfig = resolved.config
        head = [
            f"# {path.name}: {self.title}",
            *(f"# {remark}" for remark in self.remarks),
            "# shellcheck shell=bash",
        ]
        lines = [
            (f"export DGXNNODES={self.system.nodes}", ""),
            (f"export DGXNGPU=${{DGXNGPU:-{self.system.ranks_per_node}}}", ""),
            (f"export WALLTIME={clock(self.walltime_s)}", ""),
            (f"export DATADIR={preset('DATADIR', str(config.data_dir))}", ""),
        ]
        defaults = {name: field.default for name, field in vars(type(config))["__pydantic_fields__"].items()}
        for name, (variable, unit) in names(type(config), prefix).items():
            value = getattr(config, name)
            given = resolved.sources[name] != "default" and value != defaults[name]
            if name not in OF_A_RUN and (given or name in self.always):
                lines.append((f"export {variable}={quoted(name, value, config)}", unit))
        with writing(path) as partial:
            partial.write_text("\n".join([*head, *aligned(lines)]) + "\n")


def aligned(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines with their comments, those of lines that follow each other one below the other, as shfmt has it."""
    for commented, run in groupby(lines, key=lambda line: bool(line[1])):
        of_run = list(run)
        wide = max(len(code) for code, _ in of_run)
        yield from (f"{code:<{wide}} # {comment}" if commented else code for code, comment in of_run)


def quoted(name: str, value: Any, config: RunConfig) -> str:
    """A value as the shell reads it, and the settings after it."""
    if name == "backbone" and Path(value).name in BACKBONE_FILES.values():
        return preset("PRETRAINED_DIR", str(Path(value).parent)) + f"/{Path(value).name}"
    if name == "eval_epochs" and (interval := regular(value, config.epochs)):
        return f'"every {interval}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.12g}"
    return shlex.quote(",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def preset(variable: str, default: str) -> str:
    """The user's variable, or else a default."""
    text = f"${{{variable}:-{default}}}"
    if re.fullmatch(r"[\w./-]+", default):
        return text
    escaped = re.sub(r'([\\$`"}])', r"\\\1", default)
    return f'"${{{variable}:-{escaped}}}"'


def regular(epochs: Sequence[int], last: int) -> int:
    """The interval of epochs that are its multiples up to the last; 0 where they are not."""
    interval = epochs[0]
    return interval if tuple(epochs) == tuple(range(interval, last + 1, interval)) else 0


def clock(seconds: float) -> str:
    """Seconds as Slurm writes them, D-HH:MM:SS, in whole quarters of an hour and one at least."""
    quarters = max(1, -int(-seconds // 900))
    days, quarters = divmod(quarters, 96)
    text = f"{quarters // 4:02d}:{15 * (quarters % 4):02d}:00"
    return f"{days}-{text}" if days else text


def flags(settings: Mapping[str, str]) -> list[str]:
    """Settings as flags."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
