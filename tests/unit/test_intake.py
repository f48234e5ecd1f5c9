"""What a worker has not claimed yet: in which order it is claimed, and that nothing of it is lost."""

import threading
import time

import pytest

from axon_llm.serving.intake import Intake
from axon_llm.serving.ports import Delivery
from axon_llm.serving.wire import Job, Sampling


@pytest.fixture
def job() -> Job:
    return Job(
        job_id="job-1",
        tenant="default",
        model="axon-tiny",
        prompt="Once",
        sampling=Sampling(max_tokens=8, seed=1),
        deadline_unix_s=time.time() + 60,
        created_at_unix_s=time.time(),
        trace_id="trace-1",
    )


def delivery(tag: int) -> Delivery:
    return Delivery(body=b"", solo=False, redelivered=False, generation=1, tag=tag)


def tags(deliveries: list[Delivery]) -> list[int]:
    return [each.tag for each in deliveries]


def test_what_has_come_is_taken_once_and_in_order() -> None:
    intake = Intake()
    for tag in (1, 2, 3):
        intake.put(delivery(tag))
    assert tags(list(intake.arrived(0.0))) == [1, 2, 3]
    assert list(intake.arrived(0.0)) == []


def test_a_wait_ends_when_something_comes_and_when_somebody_wakes_it() -> None:
    intake = Intake()
    for come, expected in ((lambda: intake.put(delivery(7)), [7]), (intake.wake, [])):
        threading.Timer(0.05, come).start()
        began = time.monotonic()
        assert tags(list(intake.arrived(30.0))) == expected
        assert time.monotonic() - began < 20


def test_what_is_parked_is_taken_when_its_time_has_come_and_not_before(job: Job) -> None:
    intake = Intake()
    intake.park(delivery(2), job, 3600.0)
    intake.park(delivery(3), job, 0.0)
    assert [each.tag for each, _ in intake.unparked()] == [3]
    assert len(intake) == 1
    assert intake.unparked() == []


def test_everything_that_is_here_can_be_handed_back(job: Job) -> None:
    intake = Intake()
    intake.waiting.append((delivery(1), job))
    intake.suspects.append((delivery(2), job))
    intake.park(delivery(3), job, 3600.0)
    assert sorted(tags(intake.deliveries())) == [1, 2, 3]
