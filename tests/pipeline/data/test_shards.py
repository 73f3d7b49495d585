from pathlib import Path

import pytest

from pipeline.data.shards import expand_shards
from pipeline.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("b.tar", "a.tar", "c.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_directory_stands_for_its_tars_in_order(shards: Path):
    assert expand_shards(str(shards), allow_shell_urls=False) == [str(shards / f"{name}.tar") for name in "abc"]


def test_a_brace_pattern_stands_for_the_shards_it_spells(shards: Path):
    assert expand_shards(f"{shards}/{{a,c}}.tar", allow_shell_urls=False) == [
        str(shards / "a.tar"),
        str(shards / "c.tar"),
    ]


def test_a_brace_pattern_of_a_url_is_spelled_out_without_a_look_at_the_network():
    expanded = expand_shards("https://example.org/{00..02}.tar", allow_shell_urls=False)
    assert expanded == [f"https://example.org/{number:02d}.tar" for number in range(3)]


@pytest.mark.parametrize(
    "bucket", ["bucket", "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"], ids=["bucket", "access point"]
)
def test_objects_are_spelled_out_without_a_look_at_the_network(bucket: str):
    expanded = expand_shards(f"s3://{bucket}/a/{{00..01}}.tar", allow_shell_urls=False)
    assert expanded == [f"s3://{bucket}/a/{number:02d}.tar" for number in range(2)]


@pytest.mark.parametrize("login", ["me:s3cr3t@", "me:s3/cr3t@", "s3cr3t@"])
def test_a_login_in_the_url_of_an_object_is_refused_and_not_repeated(login: str):
    with pytest.raises(UserError, match="give it by the environment") as failure:
        expand_shards(f"s3://{login}bucket/0.tar", allow_shell_urls=False)
    assert "cr3t" not in str(failure.value)


def test_a_file_url_is_a_path(shards: Path):
    assert expand_shards(f"file://{shards}/a.tar", allow_shell_urls=False) == [str(shards / "a.tar")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/nowhere/a.tar", r"data\.shards: /nowhere/a\.tar does not exist"),
        ("/nowhere/{0..3}.tar", r"data\.shards: /nowhere/0\.tar does not exist \(4 of 4 missing\)"),
        ("/nowhere/{0..3.tar", r"data\.shards: .* brace"),
        ("pipe:cat a.tar", r"data\.shards: pipe:cat a\.tar would run a shell command; set data\.allow_shell_urls=true"),
        ("PIPE:cat a.tar", r"data\.shards: .* would run a shell command"),
        ("{pipe,http}:cat", r"data\.shards"),
        ("az://bucket/a.tar", r"data\.shards: .* scheme az, which is not opened; .* s3"),
        ("s3://bucket", r"data\.shards: s3://bucket names no object; write s3://bucket/path/\{0000\.\.0099\}\.tar"),
        ("s3:bucket/a.tar", r"data\.shards: s3:bucket/a\.tar names no object"),
        ("https://host/{a,b}/", r"data\.shards: https://host/a/ cannot be listed; .* https://host/a/\{0000\.\.0099\}"),
        ((), r"data\.shards names no shard"),
        (("https://a/0.tar", "https://a/0.tar"), r"data\.shards names https://a/0\.tar more than once"),
    ],
)
def test_shards_that_cannot_be_opened_are_refused_by_the_name_of_the_setting(value: str, message: str):
    with pytest.raises(UserError, match=message):
        expand_shards(value, allow_shell_urls=False)


def test_an_empty_directory_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.shards: .* holds no \*\.tar"):
        expand_shards(str(tmp_path), allow_shell_urls=False)


def test_a_pipe_is_passed_on_where_it_is_allowed():
    command = "pipe:cat a-{0..3}.tar"
    assert expand_shards(command, allow_shell_urls=True) == [command]
