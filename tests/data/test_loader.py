import pytest

from detection.data.loader import DataWorkerDied, translate_worker_errors


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
    ],
)
def test_lost_worker_is_reported_with_advice_on_memory(message):
    with pytest.raises(DataWorkerDied, match="out of memory"), translate_worker_errors():
        raise RuntimeError(message)


def test_other_errors_of_a_worker_keep_their_text():
    message = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last): ..."
    with pytest.raises(RuntimeError) as caught, translate_worker_errors():
        raise RuntimeError(message)
    assert (type(caught.value), str(caught.value)) == (RuntimeError, message)
