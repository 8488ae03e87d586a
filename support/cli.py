"""The command line: one flag per main field of `Config`, --set for the others.

In: `Config`'s fields. Out: an argparse parser whose errors are one line (exit 2), and a
`Config` from what it parsed.
"""

import argparse
import difflib
import re
import sys
from dataclasses import fields, replace

from config import PRESETS, VERSION, Config, Exit, check_field

FIELDS = {f.name: f for f in fields(Config)}
BY_SET = {name: f for name, f in FIELDS.items() if not f.metadata["flag"]}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    def __init__(self, description: str, **keywords):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=96
            ),
            **keywords,
        )
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
    many = isinstance(f.default, tuple)
    kind = type(f.default[0] if many else f.default)
    choices = tuple(PRESETS) if f.name == "preset" else f.metadata["choices"]
    names = {int: "N", float: "X", str: "TEXT"}
    metavar = "{" + ",".join(choices) + "}" if choices else names[kind]
    if many:
        keywords["nargs"] = len(f.default)
    group.add_argument(flag_of(f), type=_reader(f, kind), metavar=metavar, **keywords)


def flag_of(f) -> str:
    """The flag of a field: `gan_lr` -> --gan-lr."""
    return "--" + f.name.replace("_", "-")


def _show(value, between: str = " ") -> str:
    if isinstance(value, tuple):
        return between.join(map(str, value))
    return "" if value is False else f"{value:g}" if isinstance(value, float) else str(value)


def _reader(f, kind):
    """A function from an argument's text to its value. Its errors name the allowed range."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__}") from None
        _check(f, (value,) * len(f.default) if isinstance(f.default, tuple) else value)
        return value

    return read


def _check(f, value):
    try:
        check_field(f, value)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def _assignment(text: str) -> tuple[str, object]:
    """NAME=VALUE -> (name, value), checked."""
    name, _, value = text.partition("=")
    if name not in FIELDS:
        raise argparse.ArgumentTypeError(f"{name!r} is no field of config.py")
    f = FIELDS[name]
    if name not in BY_SET:
        raise argparse.ArgumentTypeError(f"{name!r} has a flag of its own, {flag_of(f)}")
    many = isinstance(f.default, tuple)
    kind = type(f.default[0] if many else f.default)
    try:
        parts = tuple(kind(part) for part in (value.split(",") if many else [value]))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not {kind.__name__}") from None
    _check(f, parts if many else parts[0])
    return name, parts if many else parts[0]


def flags(config: Config) -> list[str]:
    """The words of a command line that makes `config`: its preset, and what differs from it."""
    words = [] if config.preset == Config.preset else ["--preset", config.preset]
    preset = replace(Config(preset=config.preset), **PRESETS[config.preset])
    for f in FIELDS.values():
        value = getattr(config, f.name)
        if value == getattr(preset, f.name):
            continue
        if f.name in BY_SET:
            words += ["--set", f"{f.name}={','.join(_words(value))}"]
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"{flag_of(f)}={value}")  # alone, argparse would take it for a flag
        else:
            words += [flag_of(f)] if value is True else [flag_of(f), *_words(value)]
    return words


def _words(value) -> list[str]:
    return [str(part) for part in (value if isinstance(value, tuple) else (value,))]


def config_from(arguments: argparse.Namespace) -> Config:
    """Defaults, then the preset, then the flags that were given."""
    given = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in vars(arguments).items()
        if k in FIELDS
    }
    given |= dict(getattr(arguments, "set", []))
    return replace(Config(), **PRESETS[given.get("preset", "quick")] | given)
