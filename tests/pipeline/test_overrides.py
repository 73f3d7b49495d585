import shlex
import shutil
import subprocess

import braceexpand
import pytest

from pipeline.errors import UserError
from pipeline.overrides import (
    brace_pattern,
    key_of,
    refuse_repeated_keys,
    refuse_repeated_keys_of_member,
    with_quoted_braces,
)

PATTERNS = [
    "/d/{00000..00003}.tar",
    "/d/{8..11}.tar",
    "/d/{3..0}.tar",
    "/d/{0..8..2}.tar",
    "/d/{a,c,x}.tar",
    "/d/{a,b}/{00..11}.tar",
    "part-{0..1}.tar",
    "https://host/a/{000..123}.tar",
    "[/a/{0..1}.tar,/b]",
    "/d/{1,2,4}.tar",
]


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("seed=1", "seed"),
        ("+a.b=1", "a.b"),
        ("++a.b=1", "a.b"),
        ("~stage.judge", "stage.judge"),
        ("~data=scenes", "data"),
        ("model/clip@stage.clip.network=small", "model/clip@stage.clip.network"),
        ("-m", None),
        ("--members=file", None),
        ("job", None),
    ],
)
def test_a_key_counts_without_its_prefix(argument: str, key: str | None):
    assert key_of(argument) == key


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_that_a_shell_spelled_out_is_found_again(pattern: str):
    assert brace_pattern(list(braceexpand.braceexpand(pattern))) == pattern


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_bash_made_of_braces_is_refused_with_the_line_that_bash_keeps(pattern: str):
    spelled = words_of_bash(f"data.shards={pattern}")
    with pytest.raises(UserError) as refusal:
        refuse_repeated_keys(["data=webdataset", *spelled, "seed=1"])
    message, _, quoted = str(refusal.value).partition("; quote it: ")
    times = "twice" if len(spelled) == 2 else f"{len(spelled)} times"
    assert message == f"data.shards is given {times}, as the shell spelled out the braces"
    assert quoted == shlex.quote(f"data.shards={pattern}")
    assert words_of_bash(quoted) == [f"data.shards={pattern}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["seed=1", "data=emoji", "seed=2"],
            "seed is given twice (seed=1, seed=2); give it once, or sweep over its values: -m seed=1,2",
        ),
        (["-m", "seed=1,2", "seed=1,2"], "seed is given twice (seed=1,2, seed=1,2); give it once"),
        (["data=scenes", "+data=emoji"], "data is given twice (data=scenes, +data=emoji); give it once"),
        (["~stage.judge", "~stage.judge"], "stage.judge is given twice (~stage.judge, ~stage.judge); give it once"),
        (["~stage.judge", "++stage.judge.x=1"], None),
        (["data=webdataset", "data.shards=/d"], None),
        (
            ["data.shards=/d/0.tar", "seed=1", "data.shards=/d/1.tar"],
            "data.shards is given twice (data.shards=/d/0.tar, data.shards=/d/1.tar); give it once, or sweep over its "
            "values: -m data.shards=/d/0.tar,/d/1.tar",
        ),
        (["a=[1]", "a=[2]"], "a is given twice (a=[1], a=[2]); give it once, or sweep over its values: -m 'a=[1],[2]'"),
        (
            [f"seed={seed}" for seed in range(9)],
            "seed is given 9 times (seed=0, seed=1, seed=2, ..., seed=8); give it once, or sweep over its values: "
            "-m seed=0,1,2,3,4,5,6,7,8",
        ),
    ],
)
def test_a_key_that_is_given_twice_is_refused(arguments: list[str], message: str | None):
    if message is None:
        refuse_repeated_keys(arguments)
        return
    with pytest.raises(UserError) as refusal:
        refuse_repeated_keys(arguments)
    assert str(refusal.value) == message


def test_a_member_s_key_is_refused_with_the_line_of_the_file():
    refuse_repeated_keys_of_member(["seed=1"], ["data=emoji"], "members:2")
    with pytest.raises(UserError, match=r"members:2: seed is given twice \(seed=1, seed=2\); give it once$"):
        refuse_repeated_keys_of_member([], ["seed=1", "seed=2"], "members:2")
    with pytest.raises(UserError, match=r"members:3: .*twice \(seed=1, \+seed=2\); give it on the command line or in"):
        refuse_repeated_keys_of_member(["seed=1"], ["+seed=2"], "members:3")


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("a=/d/{0..3}.tar", "a='/d/{0..3}.tar'"),
        ("++a=/d/{b,c}.tar", "++a='/d/{b,c}.tar'"),
        ("a={b,c}.tar,/d", "a='{b,c}.tar',/d"),
        ("a=[/d/{0..1}.tar, /e]", "a=['/d/{0..1}.tar', /e]"),
        ("a=choice(/d/{0..1}.tar,/e)", "a=choice('/d/{0..1}.tar',/e)"),
        ("a=['/d,{0..1}.tar',/e/{0..1}.tar]", "a=['/d,{0..1}.tar','/e/{0..1}.tar']"),
        ("a=${b}/{0..1}.tar", "a='${b}/{0..1}.tar'"),
        ("a={b: 1, c: 2}", "a={b: 1, c: 2}"),
        ("a=[{b: 1},{c: 2", "a=[{b: 1},{c: 2"),
        ("a=/d/{0..1", "a=/d/{0..1"),
    ],
)
def test_only_brace_patterns_are_quoted(override: str, quoted: str):
    assert with_quoted_braces(override) == quoted


def words_of_bash(line: str) -> list[str]:
    bash = shutil.which("bash")
    assert bash is not None, "bash is missing"
    # As typed: brace expansion is on, and files are not looked for.
    command = [bash, "--norc", "-fc", f"printf '%s\\0' {line}"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")[:-1]
