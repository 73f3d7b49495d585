import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.errors import StageInterrupted
from pipeline.workflow import ownership
from pipeline.workflow.ownership import (
    ATTEMPTS,
    SECONDS_TO_BEGIN,
    Claim,
    JobStart,
    Owner,
    Ownership,
    Pulse,
    StageLost,
    Vacancy,
    acquire,
    latest_attempt,
    process_started,
    this_host,
    wait_for_first_process,
)

LEASE_S = 0.6
HOLD = """
import sys, threading, time
from pathlib import Path
from pipeline.workflow.ownership import acquire
owner = acquire(Path(sys.argv[1]), float(sys.argv[2]), threading.Event())
print(owner.attempt, flush=True)
sys.stdin.readline()
print(owner.is_lost, flush=True)
"""


@pytest.fixture
def never() -> threading.Event:
    return threading.Event()


class Holder:
    """Another process that owns a stage until it is told otherwise."""

    def __init__(self, work: Path, lease_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(work), str(lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.attempt = int(self.read())

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask_whether_it_is_lost(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()


def claim_of_elsewhere(work: Path, attempt: int) -> None:
    directory = work / ATTEMPTS
    directory.mkdir(exist_ok=True)
    claim = Claim(attempt, "another-host/boot/namespace", 1, 1, LEASE_S)
    (directory / f"{attempt:06}.json").write_text(json.dumps(asdict(claim)))


def test_a_stage_that_nobody_has_is_taken_at_once_and_given_back(tmp_path: Path, never: threading.Event):
    first = acquire(tmp_path, 60, never)
    assert (first.attempt, first.is_lost) == (1, False)
    first.require()
    first.release()
    second = acquire(tmp_path, 60, never)
    assert second.attempt == 2
    second.release()


def test_a_live_owner_is_waited_for(tmp_path: Path, never: threading.Event):
    first = acquire(tmp_path, LEASE_S, never)
    taken: list[int] = []

    def take() -> None:
        second = acquire(tmp_path, LEASE_S, never)
        taken.append(second.attempt)
        second.release()

    waiting = threading.Thread(target=take)
    waiting.start()
    time.sleep(3 * LEASE_S)
    assert taken == []
    assert not first.is_lost
    first.release()
    waiting.join(timeout=10)
    assert taken == [2]


def test_who_waits_can_be_stopped(tmp_path: Path):
    first = acquire(tmp_path, 60, threading.Event())
    stop = threading.Event()
    stop.set()
    with pytest.raises(StageInterrupted, match="another process"):
        acquire(tmp_path, 60, stop)
    first.release()


def test_a_killed_owner_of_this_host_is_succeeded_without_waiting_for_its_lease(tmp_path: Path, never: threading.Event):
    holder = Holder(tmp_path, lease_s=600)
    holder.process.kill()
    holder.process.wait()
    started = time.monotonic()
    successor = acquire(tmp_path, 600, never)
    assert time.monotonic() - started < 5
    assert successor.attempt == holder.attempt + 1
    successor.release()


def test_an_owner_whose_pid_now_belongs_to_another_process_is_dead():
    alive = Claim(1, this_host(), os.getpid(), process_started(os.getpid()), LEASE_S)
    assert not alive.is_dead
    assert replace(alive, pid_started=alive.pid_started - 1).is_dead


def test_a_process_that_the_system_hides_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.workflow.ownership.process_started", lambda _: 0)

    def not_yours(_pid: int, _signal: int) -> None:
        raise PermissionError

    claim = Claim(1, this_host(), os.getpid(), 77, LEASE_S)
    assert claim.is_dead
    monkeypatch.setattr("os.kill", not_yours)
    assert not claim.is_dead


def test_who_has_a_shorter_lease_waits_for_the_owner_s(tmp_path: Path, never: threading.Event):
    holder = Holder(tmp_path, lease_s=3.0)
    holder.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    successor = acquire(tmp_path, 0.2, never)
    assert time.monotonic() - started > 2.0
    successor.release()
    holder.process.kill()


def test_a_claim_that_a_power_cut_emptied_is_succeeded_after_a_lease(tmp_path: Path, never: threading.Event):
    (tmp_path / ATTEMPTS).mkdir()
    (tmp_path / ATTEMPTS / "000001.json").touch()
    successor = acquire(tmp_path, LEASE_S, never)
    assert successor.attempt == 2
    successor.release()


def test_a_disk_that_refuses_a_sign_of_life_does_not_end_the_signs(tmp_path: Path, never: threading.Event):
    owner = acquire(tmp_path, LEASE_S, never)
    alive = tmp_path / ATTEMPTS / "000001.alive"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    time.sleep(LEASE_S / 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
    silent = alive.read_text()
    time.sleep(LEASE_S)
    assert alive.read_text() > silent
    owner.release()


def test_a_silent_owner_of_another_host_is_succeeded_after_its_lease(tmp_path: Path, never: threading.Event):
    claim_of_elsewhere(tmp_path, 1)
    started = time.monotonic()
    successor = acquire(tmp_path, LEASE_S, never)
    assert time.monotonic() - started >= LEASE_S
    assert successor.attempt == 2
    successor.release()


def test_a_stalled_owner_is_succeeded_and_knows_it_when_it_wakes_up(tmp_path: Path, never: threading.Event):
    holder = Holder(tmp_path, LEASE_S)
    holder.process.send_signal(signal.SIGSTOP)
    successor = acquire(tmp_path, LEASE_S, never)
    assert successor.attempt == holder.attempt + 1
    holder.process.send_signal(signal.SIGCONT)
    assert holder.ask_whether_it_is_lost() == "True"
    assert not successor.is_lost
    successor.release()
    holder.process.kill()


def test_a_lost_stage_raises_before_anything_that_lasts(tmp_path: Path, never: threading.Event):
    first = acquire(tmp_path, 60, never)
    claim_of_elsewhere(tmp_path, 2)
    with pytest.raises(StageLost, match="another process has the stage now"):
        first.require()
    first.release()


def test_of_many_that_come_at_once_one_alone_has_the_stage(tmp_path: Path, never: threading.Event):
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        owner = acquire(tmp_path, 60, never)
        inside.append(owner.attempt)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(owner.attempt)
        owner.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 8
    assert latest_attempt(tmp_path / ATTEMPTS) == 8


def start_of_job(restarts: int) -> JobStart:
    return JobStart("17", restarts)


def acquire_in(job: JobStart, work: Path) -> Owner:
    return acquire(work, 1000.0, threading.Event(), job)


def test_a_later_start_of_a_job_takes_over_at_once_and_the_earlier_one_loses(tmp_path: Path):
    earlier = acquire_in(start_of_job(0), tmp_path)
    later = acquire_in(start_of_job(1), tmp_path)
    assert later.attempt == earlier.attempt + 1
    with pytest.raises(StageLost):
        earlier.require()
    later.require()
    earlier.release()
    later.release()


def test_an_earlier_start_of_a_job_that_comes_late_gives_up(tmp_path: Path):
    later = acquire_in(start_of_job(2), tmp_path)
    with pytest.raises(StageLost, match="later start"):
        acquire_in(start_of_job(1), tmp_path)
    with pytest.raises(StageLost, match="later start"):
        wait_for_first_process(tmp_path, lambda: False, threading.Event(), start_of_job(1))
    later.release()


def test_the_processes_of_one_job_start_wait_for_its_first_one_and_no_other(tmp_path: Path):
    earlier = acquire_in(start_of_job(0), tmp_path)
    asked = threading.Event()
    threading.Timer(0.3, asked.set).start()
    with pytest.raises(StageInterrupted):
        wait_for_first_process(tmp_path, lambda: False, asked, start_of_job(1))
    wait_for_first_process(tmp_path, lambda: True, threading.Event(), start_of_job(1))
    own = acquire_in(start_of_job(1), tmp_path)
    wait_for_first_process(tmp_path, lambda: False, threading.Event(), start_of_job(1))
    earlier.release()
    own.release()


def test_a_stage_is_vacant_unless_a_live_process_has_it(tmp_path: Path):
    vacancy = Vacancy(tmp_path, 1000.0)
    assert vacancy.is_free
    owner = acquire(tmp_path, 1000.0, threading.Event())
    assert not vacancy.is_free
    owner.release()
    assert vacancy.is_free


def test_a_process_that_imports_is_given_longer_to_be_heard_than_one_that_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = [100.0]
    monkeypatch.setattr(ownership.time, "monotonic", lambda: clock[0])
    alive = tmp_path / ATTEMPTS / "000001.alive"
    alive.parent.mkdir()
    (alive.parent / "000001.json").touch()
    alive.write_bytes(b"of an earlier attempt")
    pulse = Pulse(tmp_path)
    clock[0] += SECONDS_TO_BEGIN - 1
    assert not pulse.is_lost(after_s=5.0)
    alive.write_bytes(b"1")
    clock[0] += 1
    assert not pulse.is_lost(after_s=5.0)
    clock[0] += 4
    assert not pulse.is_lost(after_s=5.0)
    clock[0] += 2
    assert pulse.is_lost(after_s=5.0)
    never = Pulse(tmp_path)
    clock[0] += SECONDS_TO_BEGIN + 1
    assert never.is_lost(after_s=5.0)


def test_a_process_that_owns_nothing_writes_nothing_and_loses_nothing():
    bystander = Ownership()
    bystander.require()
    bystander.release()
    assert (bystander.writes, bystander.is_lost, bystander.attempt) == (False, False, 0)


def test_what_is_forgotten_of_earlier_attempts_leaves_the_numbers_to_go_on(tmp_path: Path):
    first = acquire(tmp_path, 1000.0, threading.Event())
    first.release()
    second = acquire(tmp_path, 1000.0, threading.Event())
    second.release()
    second.forget_earlier()
    assert {path.name[:6] for path in (tmp_path / "attempts").iterdir()} == {"000002"}
    third = acquire(tmp_path, 1000.0, threading.Event())
    assert third.attempt == 3
    third.release()
