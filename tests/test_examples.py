"""Every command that a reader may copy is handed to real shells, which must start it with the words that are read."""

import ast
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT

COMMANDS = "run|plan|submit|status|logs|cancel|sync|compare|card|board|shards|du|gc|rm|mv|sample|edit|evaluate|export"
PROGRAM = re.compile(rf"(unclip ({COMMANDS})\b|(pip|make|pytest|python3?|sudo|scancel|scontrol)( |$))")
OVERRIDE = re.compile(r"['\"]?(~\w+\.|[+~]*[a-z_]+(\.\w+|[@/][\w.]+)*=)\S")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
QUOTED_VALUE = "'a [value] of {some,kind}'"
"""Stands for a value of a message that the code quotes for a shell."""
BARE_VALUE = "(a value)"
"""Stands for one that it does not quote: no shell takes it."""

PROMPTS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-fi"]}
"""How a shell reads its standard input as it reads what is typed: comments, history, `~` and all."""
STUB = """\
#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"
printf '\\1\\0' >> "$RECORD"
"""


@dataclass(frozen=True)
class Example:
    """A command as it stands in a file, its continued lines together."""

    place: str
    text: str


def words_of(text: str) -> list[str]:
    """What a command says, with no comments: at a prompt zsh knows none."""
    return shlex.split(text.replace("\\\n", ""), comments=False)


def sources(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found, patterns
    return found


def commands_in(paragraph: str, place: str) -> Iterator[Example]:
    """The commands of a paragraph of code, which holds nothing else if it holds one."""
    lines = re.sub(r"\\\n", "\\\\\0", paragraph).splitlines()
    found = [line.replace("\0", "\n") for line in lines if PROGRAM.match(line.strip())]
    for line in found:
        assert len(found) == len(lines), f"{place}: {line!r} stands among lines that are no commands"
        yield Example(place, line.strip())


def commands_inline(text: str, place: str) -> Iterator[Example]:
    """The commands, and the overrides of one, that stand in backticks."""
    for match in INLINE.finditer(text):
        words = " ".join(match.group(1).split())
        if PROGRAM.match(words):
            yield Example(place, words)
        elif OVERRIDE.match(words):
            yield Example(place, f"unclip run {words}")


def in_markdown(path: Path) -> Iterator[Example]:
    place = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    fenced = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    indented = re.compile(r"(?:^|\n\n)((?: {4}.*\n?)+)")
    for code in (fenced, indented):
        for match in code.finditer(text):
            yield from commands_in(re.sub(r"^ {4}", "", match.group(1), flags=re.MULTILINE), place)
        text = code.sub("\n\n", text)
    yield from commands_inline(text, place)


def in_config(path: Path) -> Iterator[Example]:
    """Comments, and the help of the command line."""
    place = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    lines = [re.sub(r"^\s*#?\s*", "", line) for line in text.splitlines()]
    joined = "\n".join(lines).replace("\\\n", "\\\0").splitlines()
    for line in joined:
        if PROGRAM.match(line):
            yield Example(place, line.replace("\0", "\n"))
    yield from commands_inline("\n".join(lines), place)


def in_python(path: Path) -> Iterator[Example]:
    """Docstrings, messages and whatever else is a string: lines that are indented by four or more, and backticks."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(map(of_part, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        for line in re.findall(r"^ {4,}(\S.*)$", text, flags=re.MULTILINE):
            if PROGRAM.match(line):
                yield Example(place, line)
        yield from commands_inline(text, place)


def of_part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return QUOTED_VALUE if ast.unparse(part.value).startswith(("shlex.quote(", "shlex.join(")) else BARE_VALUE


def examples() -> Iterator[Example]:
    for path in sources("*.md", "slurm/*.md", "docs/**/*.md", "pipeline/**/*.md"):
        yield from in_markdown(path)
    for path in sources("conf/**/*.yaml"):
        yield from in_config(path)
    for path in sources("pipeline/**/*.py", "stages/**/*.py", "slurm/*.py", "benchmarks/*.py"):
        yield from in_python(path)


class Shell:
    """A shell at its prompt, where no program can be started but stubs that write down their words."""

    def __init__(self, name: str, place: Path) -> None:
        self._command = [required(name), *PROMPTS[name]]
        self._place = place / name
        (self._place / "bin").mkdir(parents=True)

    def words(self, text: str) -> list[list[str]] | str:
        """The words of each command that it started for a pasted text, or what it said where it failed."""
        record = self._place / "record"
        record.unlink(missing_ok=True)
        self._stub(re.split(r"\s", text)[0])
        done = subprocess.run(
            self._command,
            input=f"{text}\n",
            env={"PATH": str(self._place / "bin"), "HOME": str(self._place), "RECORD": str(record), "TERM": "dumb"},
            cwd=self._place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,  # an interactive shell would take the terminal of the tests
        )
        if done.returncode != 0:
            return done.stderr
        started = record.read_text().split("\1\0") if record.exists() else []
        return [each.split("\0")[:-1] for each in started if each]

    def _stub(self, program: str) -> None:
        stub = self._place / "bin" / program
        stub.write_text(STUB)
        stub.chmod(0o755)


def required(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        message = f"{name} is missing; sudo apt-get install -y {name} brings it"
        pytest.skip(message)
    return program


@pytest.mark.parametrize("name", PROMPTS)
def test_every_example_reaches_its_command_as_it_is_written(name: str, tmp_path: Path):
    shell = Shell(name, tmp_path)
    places: dict[str, list[str]] = {}
    for example in examples():
        places.setdefault(example.text, []).append(example.place)
    spoiled = []
    for text, where in places.items():
        found = shell.words(text)
        if found != [words_of(text)]:
            spoiled.append(f"{', '.join(where)}: {text!r} gives {found!r}")
    assert not spoiled, "\n".join(spoiled)


@pytest.mark.parametrize(
    "text",
    [
        "unclip run ~stage.x data.shards=/d/{0..3}.tar",
        "unclip run ~stage.x",
        "unclip run data.shards=/d/{0..3}.tar",
        "unclip run trainer.devices=8  # many",
        "unclip run a=[1,2]",
        "unclip compare lambda.*",
        "unclip sample demo a! b?",
        "unclip run a=b; unclip plan",
        "unclip status =run",
        f"unclip shards index {BARE_VALUE}",
    ],
)
def test_a_line_that_a_shell_spoils_is_caught(text: str, tmp_path: Path):
    found = {name: Shell(name, tmp_path).words(text) for name in PROMPTS}
    assert any(each != [words_of(text)] for each in found.values()), found


def test_examples_are_found_where_they_are():
    found = {(each.place.partition(":")[0], words_of(each.text)[0]) for each in examples()}
    assert {
        ("README.md", "unclip"),
        ("README.md", "make"),
        ("docs/sweeps.md", "pip"),
        ("docs/figures.md", "python"),
        ("slurm/README.md", "unclip"),
        ("slurm/README.md", "sudo"),
        ("conf/experiment/paper.yaml", "unclip"),
        ("conf/hydra/help/unclip.yaml", "unclip"),
        ("stages/decoder/settings.py", "unclip"),
        ("slurm/one_machine.py", "python"),
        ("benchmarks/report.py", "python"),
    } <= found
