"""Fake of ``modules.call_queue``: one thing after the other, first come, first served."""

import threading


class FIFOLock:
    """Not to be taken twice by the same thread, like the hosts'."""

    def __init__(self):
        self._lock = threading.Lock()
        self.holders = []

    def __enter__(self):
        if not self._lock.acquire(timeout=60):
            raise RuntimeError("the queue lock is taken for good")
        self.holders.append(threading.get_ident())

    def __exit__(self, *exc):
        self._lock.release()

    def locked(self):
        return self._lock.locked()


queue_lock = FIFOLock()
