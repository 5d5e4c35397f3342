"""Config file of a system, config_NAME.sh, written from settings."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from detection.atomic_file import atomic_write
from detection.checkpoint.backbone_urls import BACKBONE_FILES
from detection.config.run_config import RunConfig
from detection.config.settings import LaunchLayout, ResolvedSettings, env_names

# Settings of a single run rather than of a system.
RUN_ONLY_SETTINGS = {
    *("mode", "weights", "benchmark_input", "benchmark_steps", "benchmark_warmup", "data_dir", "log_dir", "run_dir"),
    *("resume", "max_steps", "run_index", "summary_json", "seed", "system", "platform", "page_cache_dropped"),
    "echo_log",
}


@dataclass(frozen=True)
class ConfigFile:
    """Contents of a config file.

    title: description of the system. walltime_s: time limit for a scheduler. always_written: settings to write even
    with their default value.
    """

    title: str
    comments: Sequence[str]
    layout: LaunchLayout
    walltime_s: float
    always_written: Sequence[str] = ()

    def write(self, path: Path, resolved: ResolvedSettings[Any], prefix: str) -> None:
        """Write the settings that differ from their defaults, each with its unit."""
        config: RunConfig = resolved.config
        header = [
            f"# {path.name}: {self.title}",
            *(f"# {comment}" for comment in self.comments),
            "# shellcheck shell=bash",
        ]
        lines = [
            (f"export DGXNNODES={self.layout.num_nodes}", ""),
            (f"export DGXNGPU=${{DGXNGPU:-{self.layout.ranks_per_node}}}", ""),
            (f"export WALLTIME={slurm_time(self.walltime_s)}", ""),
            (f"export DATADIR={env_default('DATADIR', str(config.data_dir))}", ""),
        ]
        defaults = {name: field.default for name, field in vars(type(config))["__pydantic_fields__"].items()}
        for name, (variable, unit) in env_names(type(config), prefix).items():
            value = getattr(config, name)
            is_changed = resolved.sources[name] != "default" and value != defaults[name]
            if name not in RUN_ONLY_SETTINGS and (is_changed or name in self.always_written):
                lines.append((f"export {variable}={shell_value(name, value, config)}", unit))
        with atomic_write(path) as partial:
            partial.write_text("\n".join([*header, *align_comments(lines)]) + "\n")


def align_comments(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Align the comments of consecutive lines, as shfmt does."""
    for has_comment, group in groupby(lines, key=lambda line: bool(line[1])):
        block = list(group)
        width = max(len(code) for code, _ in block)
        yield from (f"{code:<{width}} # {comment}" if has_comment else code for code, comment in block)


def shell_value(name: str, value: Any, config: RunConfig) -> str:
    """Format a setting's value for the shell."""
    if name == "pretrained_backbone" and Path(value).name in BACKBONE_FILES.values():
        return env_default("PRETRAINED_DIR", str(Path(value).parent)) + f"/{Path(value).name}"
    if name == "eval_epochs" and (every := eval_interval(value, config.epochs)):
        return f'"every {every}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.12g}"
    return shlex.quote(",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def env_default(variable: str, default: str) -> str:
    """Return a shell expression: the variable, or the default if it is not set."""
    text = f"${{{variable}:-{default}}}"
    if re.fullmatch(r"[\w./-]+", default):
        return text
    escaped = re.sub(r'([\\$`"}])', r"\\\1", default)
    return f'"${{{variable}:-{escaped}}}"'


def eval_interval(epochs: Sequence[int], num_epochs: int) -> int:
    """Return the interval if the epochs are all its multiples up to num_epochs, else 0."""
    interval = epochs[0]
    return interval if tuple(epochs) == tuple(range(interval, num_epochs + 1, interval)) else 0


def slurm_time(seconds: float) -> str:
    """Format seconds for Slurm as D-HH:MM:SS, rounded up to a quarter of an hour."""
    quarters = max(1, -int(-seconds // 900))
    days, quarters = divmod(quarters, 96)
    text = f"{quarters // 4:02d}:{15 * (quarters % 4):02d}:00"
    return f"{days}-{text}" if days else text


def to_flags(settings: Mapping[str, str]) -> list[str]:
    """Return settings as command-line flags."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
