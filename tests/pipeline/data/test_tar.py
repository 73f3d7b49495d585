"""Archives with one thing wrong each, read strictly; GNU tar's and Python's own readers are the reference."""

import io
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.tar import BLOCK, Damage, Member, NotAFile, member_digest, parse_header, read_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SIZES = (0, 1, 511, 512, 513, 5000)


def archive(names: list[str], tar_format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    """Members with contents of several sizes; a float time makes PAX write a header of its own for each."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tar_format) as writer:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = SIZES[number % len(SIZES)], mtime  # pyright: ignore[reportAttributeAccessIssue]
            writer.addfile(member, io.BytesIO(bytes([number % 251 + 1]) * member.size))
    return content.getvalue()


def found_in(content: bytes) -> tuple[list[str], Counter[str]]:
    """The names of the members, and what else was found."""
    found = list(read_members(memoryview(content)))
    names = [each.name for each in found if isinstance(each, Member)]
    return names, Counter(str(each) for each in found if not isinstance(each, Member))


NAMES = [f"{number:04d}.{extension}" for number in range(10) for extension in ("jpg", "txt")]
WHOLE = archive(NAMES)


def listing(content: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content)) as reader:
        return reader.getmembers()


HEADERS = [member.offset for member in listing(WHOLE)]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "names",
    [["a.txt", "dir/b.txt"], ["ünicode.txt", "漢字.txt"], ["x" * 99 + ".txt", "d/" * 60 + "e.txt", "y" * 230 + ".txt"]],
    ids=["plain", "unicode", "long"],
)
def test_members_are_those_that_pythons_own_reader_finds(tar_format: int, names: list[str]):
    if tar_format == tarfile.USTAR_FORMAT:
        names = [name for name in names if len(name.encode()) < 150 and len(name.rpartition("/")[2]) <= 100]
    content = archive(names, tar_format, mtime=1.5 if tar_format == tarfile.PAX_FORMAT else 1)
    expected = [(member.name, member.offset_data, member.size) for member in listing(content)]
    found = list(read_members(memoryview(content)))
    assert [each[:3] for each in found] == expected


def test_digests_follow_the_content_and_the_name_and_not_the_time():
    def digests(content: bytes) -> list[int]:
        return [each.digest for each in read_members(memoryview(content)) if isinstance(each, Member)]

    base = digests(archive(["a.txt", "b.txt"]))
    assert digests(archive(["a.txt", "b.txt"], mtime=77)) == base
    assert digests(archive(["a.txt", "c.txt"]))[0] == base[0]
    assert digests(archive(["a.txt", "c.txt"]))[1] != base[1]
    changed = bytearray(archive(["a.txt", "b.txt"]))
    changed[3 * BLOCK - BLOCK] ^= 1  # the only byte of b.txt
    assert digests(bytes(changed))[1] != base[1]


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("at", [0, 5, 110, 130, 140, 150, 156, 257, 300, 400, 511])
def test_one_flipped_bit_in_a_header_costs_its_member_alone(at: int, bit: int):
    broken = bytearray(WHOLE)
    broken[HEADERS[7] + at] ^= 1 << bit
    names, others = found_in(bytes(broken))
    lost = {NAMES[7]} if at not in range(257, 262) else {NAMES[7], NAMES[6]}
    assert set(NAMES) - set(names) <= lost
    assert NAMES[7] not in names
    assert others == {Damage.DAMAGED_HEADER: 1}


def test_an_archive_cut_anywhere_is_damaged_and_gives_only_whole_members():
    ends = [member.offset_data + member.size for member in listing(WHOLE)]
    end_of_members = (ends[-1] + BLOCK - 1) // BLOCK * BLOCK
    for cut in range(0, end_of_members + 1, 100):
        names, others = found_in(WHOLE[:cut])
        assert names == NAMES[: sum(end <= cut and HEADERS[n] + BLOCK <= cut for n, end in enumerate(ends))]
        assert others.total() == 1, cut
        assert set(others) <= {Damage.TRUNCATED, Damage.NO_END_MARK}


def test_a_cut_at_the_boundary_of_a_member_is_a_missing_end_mark():
    names, others = found_in(WHOLE[: HEADERS[12]])
    assert names == NAMES[:12]
    assert others == {Damage.NO_END_MARK: 1}


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_an_archive_is_whole_that_ends_with_zeros_however_many(blocks: int):
    end = WHOLE.rstrip(b"\0")
    padded = end + bytes(-len(end) % BLOCK)
    assert found_in(padded + bytes(blocks * BLOCK)) == (NAMES, Counter())


def test_a_zeroed_header_costs_its_member_alone():
    broken = bytearray(WHOLE)
    broken[HEADERS[5] : HEADERS[5] + BLOCK] = bytes(BLOCK)
    names, others = found_in(bytes(broken))
    assert names == [name for name in NAMES if name != NAMES[5]]
    assert others == {Damage.ZEROED_BLOCK: 1}


def test_zeros_over_several_members_cost_those_alone():
    broken = bytearray(WHOLE)
    broken[HEADERS[4] : HEADERS[9] + 100] = bytes(HEADERS[9] + 100 - HEADERS[4])
    names, others = found_in(bytes(broken))
    assert names == [*NAMES[:4], *NAMES[10:]]
    assert others.total() == 1


def test_two_archives_one_after_the_other_are_read_and_said():
    more = archive(["late.jpg", "late.txt"])
    assert found_in(WHOLE + more) == ([*NAMES, "late.jpg", "late.txt"], Counter({Damage.BEHIND_END_MARK: 1}))


def test_an_archive_behind_one_that_was_cut_does_not_end_up_in_its_last_member():
    more = archive(["late.jpg", "late.txt"])
    cut = HEADERS[11] + BLOCK + 1000  # NAMES[11] has 5000 bytes
    names, others = found_in(WHOLE[:cut] + more)
    assert NAMES[11] not in names
    assert set(others) & {Damage.DAMAGED_HEADER, Damage.TRUNCATED, Damage.MISSING_BYTES}
    assert set(names) <= {*NAMES[:11], "late.jpg", "late.txt"}


def test_bytes_that_are_missing_from_a_member_do_not_make_it_run_into_the_next_one():
    """Whole blocks are missing, so that all later headers stand on the grid again."""
    broken = bytearray(WHOLE)
    del broken[HEADERS[11] + 2 * BLOCK : HEADERS[11] + 4 * BLOCK]
    names, others = found_in(bytes(broken))
    assert names == [name for name in NAMES if name != NAMES[11]]
    assert others == {Damage.MISSING_BYTES: 1}


def test_a_tar_in_a_tar_is_a_member_like_any_other():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as writer:
        for name, inner in (("a.tar", WHOLE), ("b.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(inner)
            writer.addfile(member, io.BytesIO(inner))
    assert found_in(content.getvalue()) == (["a.tar", "b.txt"], Counter())


def test_an_archive_behind_one_that_ends_inside_a_large_member_is_read():
    whole = archive(["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "large.jpg"])  # the last one has 5000 bytes
    start = listing(whole)[-1].offset_data
    names, others = found_in(whole[: start + 77] + archive(["late.txt"], tar_format=tarfile.GNU_FORMAT)[: 2 * BLOCK])
    assert names == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "late.txt"]
    assert others == {Damage.TRUNCATED: 1, Damage.MISSING_BYTES: 1}


def test_a_member_whose_extended_header_cannot_be_read_is_lost_and_not_renamed():
    long = "d/" * 60 + "e.txt"
    broken = archive(["a.txt", long, "b.txt"], tarfile.PAX_FORMAT).replace(b" path=", b"_path=")
    names, others = found_in(broken)
    assert names == ["a.txt", "b.txt"]
    assert others == {Damage.DAMAGED_HEADER: 1}


def test_an_archive_of_no_whole_blocks_is_damaged():
    assert found_in(WHOLE[:-100]) == (NAMES, Counter({Damage.MISSING_BYTES: 1}))


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("at", [0, 110, 130, 150, 156, 300])
def test_one_flipped_bit_in_an_archive_from_before_posix_costs_its_member_alone(tmp_path: Path, at: int, bit: int):
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_bytes(b"x" * 700)
    names = sorted(path.name for path in tmp_path.iterdir())
    subprocess.run(["tar", "--format=v7", "-cf", "x.tar", *names], cwd=tmp_path, check=True)
    broken = bytearray((tmp_path / "x.tar").read_bytes())
    broken[listing(bytes(broken))[4].offset + at] ^= 1 << bit
    assert found_in(bytes(broken)) == (
        [name for name in names if name != names[4]],
        Counter({Damage.DAMAGED_HEADER: 1}),
    )


def test_garbage_behind_the_end_is_said():
    assert found_in(WHOLE + b"garbage" * 100) == (NAMES, Counter({Damage.BEHIND_END_MARK: 1}))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, NotAFile.LINK),
        (tarfile.SYMTYPE, NotAFile.LINK),
        (tarfile.FIFOTYPE, NotAFile.SPECIAL_FILE),
        (tarfile.CHRTYPE, NotAFile.SPECIAL_FILE),
        (b"Z", NotAFile.SPECIAL_FILE),
    ],
)
@pytest.mark.parametrize("size", [0, 700])
def test_members_of_other_kinds_cost_themselves_alone(kind: bytes, reason: NotAFile, size: int):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as writer:
        for name in ("a.txt", "odd", "b.txt"):
            member = tarfile.TarInfo(name)
            if name == "odd":
                member.type, member.linkname, member.size = kind, "a.txt", size
                writer.fileobj.write(member.tobuf(tarfile.USTAR_FORMAT))  # pyright: ignore[reportOptionalMemberAccess]
                writer.fileobj.write(bytes([7]) * size + bytes(-size % BLOCK))  # pyright: ignore[reportOptionalMemberAccess]
                writer.offset = writer.fileobj.tell()  # pyright: ignore[reportOptionalMemberAccess]
                continue
            member.size = 3
            writer.addfile(member, io.BytesIO(b"abc"))
    assert found_in(content.getvalue()) == (["a.txt", "b.txt"], Counter({reason: 1}))


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_sparse_files_cost_themselves_alone(tmp_path: Path, tar_format: str):
    (tmp_path / "a.txt").write_bytes(b"abc")
    with (tmp_path / "hole.jpg").open("wb") as file:
        for position in range(0, 40 * 2**16, 2**17):  # so many pieces that the map needs blocks of its own
            file.seek(position)
            file.write(b"x" * 4096)
        file.truncate(2**23)
    (tmp_path / "z.txt").write_bytes(b"xyz")
    command = ["tar", "--sparse", f"--format={tar_format}", "-cf", "x.tar", "a.txt", "hole.jpg", "z.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    content = (tmp_path / "x.tar").read_bytes()
    if len(content) > 2**22:
        pytest.fail("the file system keeps no holes, so that tar wrote no sparse file")
    assert found_in(content) == (["a.txt", "z.txt"], Counter({NotAFile.SPARSE_FILE: 1}))


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, tar_format: str):
    (tmp_path / "d").mkdir()
    long = "n" * (60 if tar_format in ("v7", "ustar") else 180) + ".txt"
    for name in ("a.txt", "d/b.txt", long):
        (tmp_path / name).write_bytes(name.encode())
    command = ["tar", f"--format={tar_format}", "-cf", "x.tar", "d", "a.txt", long]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert found_in((tmp_path / "x.tar").read_bytes()) == (["d/b.txt", "a.txt", long], Counter())


def test_a_size_in_base_256_is_read():
    header = bytearray(tarfile.TarInfo("big.bin").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (2**33 + 5).to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    parsed = parse_header(bytes(header))
    assert parsed is not None
    assert parsed.size == 2**33 + 5


def test_random_damage_never_gives_a_member_that_is_not_there():
    """300 archives with random bytes changed, cut out or zeroed: what is found was there, with its own content."""
    good = {each.name: each.digest for each in read_members(memoryview(WHOLE)) if isinstance(each, Member)}
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(WHOLE)
        first = rng.randrange(len(WHOLE))
        last = min(len(WHOLE), first + rng.choice([1, 10, 512, 3000]))
        match rng.randrange(3):
            case 0:
                broken[first:last] = rng.randbytes(last - first)
            case 1:
                broken[first:last] = bytes(last - first)
            case _:
                del broken[first:last]
        found = list(read_members(memoryview(bytes(broken))))
        for each in found:
            if isinstance(each, Member):
                assert each.name in good
                header = bytes(broken[each.offset - BLOCK : each.offset])
                assert each.digest == member_digest(header, bytes(broken[each.offset : each.offset + each.size]))
        missing = set(good) - {each.name for each in found if isinstance(each, Member)}
        if missing and not any(isinstance(each, Damage) for each in found):
            # Zeros from a header to the end are an end like any other.
            assert missing == set(NAMES[-len(missing) :])
            assert not bytes(broken[HEADERS[len(NAMES) - len(missing)] :]).strip(b"\0")
