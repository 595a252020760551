"""What pynetdicom's sender lacks to be relied upon in a test."""

from pynetdicom.association import Association

__all__ = ["keep_answers"]


def keep_answers(association: Association) -> Association:
    """Keep the association's own thread from taking answers that a ``send_*`` method waits for.

    The thread is told to pause, but looks once more for messages where it was about to run (pynetdicom 3.0.4,
    ``Association._run_reactor``). On a busy machine that loses one answer in a thousand, after a fast receiver. The
    thread never blocks for a message and the methods always do.
    """
    get = association.dimse.get_msg
    association.dimse.get_msg = lambda block=False: get(block) if block else (None, None)  # type: ignore[method-assign]
    return association
