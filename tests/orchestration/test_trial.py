"""What a trial makes of the errors of several workers."""

from ray.train import WorkerGroupError

from sddit.orchestration.trial import _worker_error

LOST = RuntimeError("Connection closed by peer")


def of(kind):
    return RuntimeError(f"Traceback (most recent call last):\n  …\nsddit.errors.{kind}: why")


def test_the_cause_is_an_error_of_our_own_not_what_it_does_to_the_others():
    assert _worker_error(WorkerGroupError("", {0: LOST, 1: of("OutageError")})) == "sddit.errors.OutageError: why"
    assert _worker_error(WorkerGroupError("", {1: LOST, 0: of("DivergedError")})) == "sddit.errors.DivergedError: why"
    assert _worker_error(WorkerGroupError("", {0: LOST})) == str(LOST)
    assert _worker_error(RuntimeError("a\nb")) == "b"
