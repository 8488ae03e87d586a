"""The command line: one flag per main field of `Config`, --set for the others.

In: `Config`'s fields. Out: an argparse parser whose errors are one line (exit 2), and a
`Config` from what it parsed.
"""

import argparse
import difflib
import functools
import re
import sys
from dataclasses import fields, replace

from config import PRESETS, VERSION, Config, Exit, check_field

FIELDS = {f.name: f for f in fields(Config)}
BY_SET = {name: f for name, f in FIELDS.items() if not f.metadata["flag"]}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    def __init__(self, description: str, **keywords):
        layout = functools.partial(argparse.HelpFormatter, max_help_position=30, width=96)
        keywords |= {"description": description, "formatter_class": layout}
        super().__init__(allow_abbrev=False, **keywords)
        self.fields = {}  # that can be set by this command line
        self.add_argument("--version", action="version", version=VERSION)

    def error(self, message):
        hint = "see --help"
        if unknown := re.match(r"unrecognized arguments: --([\w-]+)", message):
            name = unknown[1].replace("-", "_")
            for near in difflib.get_close_matches(name, self.fields, 1):
                flag = f"--set {near}=VALUE" if near in BY_SET else flag_of(FIELDS[near])
                hint = f"did you mean {flag}?"
        print(f"error: {message}; {hint}", file=sys.stderr)
        raise SystemExit(int(Exit.USAGE))


def add_options(parser: Parser, names=None, **shown):
    """Add the flags of `Config`'s fields, or of `names` only. Absent flags set no attribute.

    shown: text for a field's default in --help, if it is not the default itself.
    """
    group = parser
    for f in FIELDS.values():
        if names is None and f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        if f.name not in BY_SET if names is None else f.name in names:
            _add_flag(group, f, shown.get(f.name, _show(f.default)))
    if names is None:
        parser.fields = FIELDS
        rest = ", ".join(f"{name}={_show(f.default, ',')}" for name, f in BY_SET.items())
        parser.add_argument(
            "--set", action="append", default=[], type=_assignment, metavar="NAME=VALUE",
            help="set another field of config.py, which explains it; several numbers by "
            f"commas; repeatable [{rest}]",
        )  # fmt: skip


def _add_flag(group, f, default: str):
    note = f" [{default}]" if default and "[" not in f.metadata["help"] else ""
    keywords = {"help": f.metadata["help"] + note, "default": argparse.SUPPRESS}
    if isinstance(f.default, bool):
        group.add_argument(flag_of(f), action="store_true", **keywords)
        return
    choices = f.metadata["choices"]
    names = {int: "N", float: "X", str: "TEXT"}
    metavar = "{" + ",".join(choices) + "}" if choices else names[_kind(f)]
    n = len(f.default) if isinstance(f.default, tuple) else None

    def read(text: str):  # one of n arguments
        value = _value(f, text, [text] * (n or 1))
        return value[0] if n else value

    group.add_argument(flag_of(f), type=read, nargs=n, metavar=metavar, **keywords)


def flag_of(f) -> str:
    """The flag of a field: `gan_lr` -> --gan-lr."""
    return "--" + f.name.replace("_", "-")


def _show(value, between: str = " ") -> str:
    if isinstance(value, tuple):
        return between.join(map(str, value))
    return "" if value is False else f"{value:g}" if isinstance(value, float) else str(value)


def _kind(f) -> type:
    """The type of a field's value, or of each of its numbers."""
    return type(f.default[0] if isinstance(f.default, tuple) else f.default)


def _value(f, text: str, parts: list[str]):
    """A field's value from the parts of a text. Errors name the allowed range."""
    try:
        values = tuple(map(_kind(f), parts))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_kind(f).__name__}") from None
    value = values if isinstance(f.default, tuple) else values[0]
    try:
        check_field(f, value)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return value


def _assignment(text: str) -> tuple[str, object]:
    """NAME=VALUE -> (name, value), checked."""
    name, _, value = text.partition("=")
    if name not in FIELDS:
        raise argparse.ArgumentTypeError(f"{name!r} is no field of config.py")
    f = FIELDS[name]
    if name not in BY_SET:
        raise argparse.ArgumentTypeError(f"{name!r} has a flag of its own, {flag_of(f)}")
    parts = value.split(",") if isinstance(f.default, tuple) else [value]
    return name, _value(f, value, parts)


def flags(config: Config) -> list[str]:
    """The words of a command line that makes `config`: its preset, and what differs from it."""
    words = [] if config.preset == Config.preset else ["--preset", config.preset]
    preset = replace(Config(preset=config.preset), **PRESETS[config.preset])
    for f in FIELDS.values():
        value = getattr(config, f.name)
        if value == getattr(preset, f.name):
            continue
        texts = [str(part) for part in (value if isinstance(value, tuple) else (value,))]
        if f.name in BY_SET:
            words += ["--set", f"{f.name}={','.join(texts)}"]
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"{flag_of(f)}={value}")  # alone, argparse would take it for a flag
        else:
            words += [flag_of(f)] if value is True else [flag_of(f), *texts]
    return words


def config_from(arguments: argparse.Namespace) -> Config:
    """Defaults, then the preset, then the flags that were given."""
    given = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in vars(arguments).items()
        if k in FIELDS
    }
    given |= dict(getattr(arguments, "set", []))
    return replace(Config(), **PRESETS[given.get("preset", "quick")] | given)
