"""Man pages and shell completion, of the parsers that the commands themselves use; `make install` runs it.

python -m refault.cli.pages PREFIX/share
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from refault import __version__
from refault.cli.main import build_parser
from refault.daemon.host.paths import runtime_directory

_EXIT_STATUS = "Exit status: "
_FILES = "files"
_FILE_NAMES = frozenset({"FILE", "FILE.html", "PATH", "DIR"})
"""What stands for a file's name in the help."""


def main(share: Path) -> None:
    """Writes all files below ``share``."""
    top = build_parser([])
    commands = _commands(top)
    files = {
        "man/man1/refault.1": man_page("refault", top, f"{top.description}", commands),
        "bash-completion/completions/refault": bash_completion(top, commands),
        "zsh/site-functions/_refault": zsh_completion(top, commands),
    }
    for name, parser in commands.items():
        page = man_page(f"refault-{name}", parser, _short_help(top, name), commands)
        files[f"man/man1/refault-{name}.1"] = page
    for name, text in files.items():
        file = share / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _subparsers(top: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))


def _commands(top: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    return _subparsers(top).choices


def _short_help(top: argparse.ArgumentParser, name: str) -> str:
    return next(str(choice.help) for choice in _subparsers(top)._choices_actions if choice.dest == name)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [each for each in parser._actions if not isinstance(each, argparse._SubParsersAction)]


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _value(action: argparse.Action) -> str:
    """What stands for the value of an option, or for a positional; empty where it takes none."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


# man pages


def man_page(
    name: str, parser: argparse.ArgumentParser, short: str, commands: Mapping[str, argparse.ArgumentParser]
) -> str:
    """The page of one command, or of all where ``parser`` has them below it (man(7))."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = [
        f'.TH {name.upper()} 1 "" "refault {__version__}"',
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(short.rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_roff(parser.prog)}",
        _roff(usage.removeprefix(parser.prog).strip()),
        ".SH DESCRIPTION",
        _roff(parser.description or short),
    ]
    if options := _actions(parser):
        lines.append(".SH OPTIONS")
        for action in options:
            lines += [".TP", _roff_option(action), _roff(_help(parser, action))]
    if parser.prog == "refault":
        lines.append(".SH COMMANDS")
        for command in commands:
            lines += [".TP", f"\\fBrefault\\-{_roff(command)}\\fR(1)", _roff(_short_help(parser, command))]
    if parser.epilog:
        heading, text = ".SH NOTES", parser.epilog
        if text.startswith(_EXIT_STATUS):
            heading, text = '.SH "EXIT STATUS"', text.removeprefix(_EXIT_STATUS)
        lines += [heading, _roff(text)]
    others = ["refault", *(f"refault-{each}" for each in commands)]
    see = ", ".join(f"\\fB{_roff(each)}\\fR(1)" for each in others if each != name)
    return "\n".join([*lines, '.SH "SEE ALSO"', see]) + "\n"


def _roff_option(action: argparse.Action) -> str:
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in action.option_strings)
    value = f"\\fI{_roff(_value(action))}\\fR" if _value(action) else ""
    return " ".join(filter(None, (names, value)))


def _roff(text: str) -> str:
    """Text as it stands: no request, no escape, and hyphens that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


# completion


def bash_completion(top: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """A script for bash-completion's directory."""
    cases = "".join(f"    {name})\n{_bash_case(parser)}        ;;\n" for name, parser in commands.items())
    first = shlex.quote(" ".join([*commands, *_options(top)]))
    return f"""\
# bash completion of refault, made from its own help
_refault() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} options operand values
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {first} -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}    *) return ;;
    esac
    [[ -n $values || $word == -* ]] || values=$operand
    case $values in
    none) ;;
    files) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word")) ;;
    '') COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$values" -- "$word")) ;;
    esac
}}
complete -F _refault refault
"""


def _bash_case(parser: argparse.ArgumentParser) -> str:
    actions = _actions(parser)
    operands = {_kind(action) for action in actions if not action.option_strings}
    values = "".join(
        f"        {'|'.join(action.option_strings)}) values={shlex.quote(_kind(action))} ;;\n"
        for action in actions
        if action.option_strings and action.nargs != 0
    )
    operand = _FILES if _FILES in operands else ""
    return (
        f"        options={shlex.quote(' '.join(_options(parser)))} operand={operand}\n"
        f"        case $before in\n{values}        esac\n"
    )


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in _actions(parser) for name in action.option_strings]


def _kind(action: argparse.Action) -> str:
    """What can be said of a value: its choices, that it is a file, or nothing."""
    if action.choices is not None:
        return " ".join(map(str, action.choices))
    return _FILES if action.metavar in _FILE_NAMES else "none"


def zsh_completion(top: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """A function for a directory of $fpath."""
    described = " ".join(shlex.quote(f"{name}:{_short_help(top, name)}") for name in commands)
    cases = "".join(
        f"  {name}) _arguments {' '.join(_zsh_specifications(parser))} ;;\n"
        for name, parser in commands.items()
    )
    return f"""\
#compdef refault
# made from refault's own help
local -a commands=({described})
if (( CURRENT == 2 )); then
  _describe command commands
  _arguments {" ".join(_zsh_specifications(top))}
  return
fi
shift words
(( CURRENT-- ))
case $words[1] in
{cases}esac
"""


def _zsh_specifications(parser: argparse.ArgumentParser) -> Iterator[str]:
    """As _arguments takes them (zshcompsys(1))."""
    for action in _actions(parser):
        value = ""
        if action.nargs != 0:
            kind = _kind(action)
            message = _value(action) if action.choices is None else action.dest
            does = {_FILES: "_files", "none": ""}.get(kind, f"({kind})")
            value = f":{_zsh(message)}:{does}"
        if not action.option_strings:  # none has two
            yield shlex.quote(f"{'*' if action.nargs in ('*', '+') else '1'}{value}")
        again = "*" if isinstance(action, argparse._AppendAction) else ""
        for name in action.option_strings:
            yield shlex.quote(f"{again}{name}[{_zsh(_help(parser, action))}]{value}")


def _zsh(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


if __name__ == "__main__":
    # The defaults are those of who reads them, not of who installs or builds a package.
    os.environ["RUNTIME_DIRECTORY"] = str(runtime_directory({}, 0))
    os.environ.pop("STATE_DIRECTORY", None)
    main(Path(sys.argv[1]))
