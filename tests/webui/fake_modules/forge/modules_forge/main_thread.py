"""Fake of ``modules_forge.main_thread``: what moves models runs in one thread, in inference mode.

An exception comes back as None, and anything that isn't an Exception ends the thread.
"""

import queue
import threading

import torch

tasks: queue.Queue = queue.Queue()
last_exception = None
thread = None


class Task:
    def __init__(self, function, arguments, named):
        self.function, self.arguments, self.named = function, arguments, named
        self.result, self.finished = None, threading.Event()

    def work(self):
        global last_exception
        try:
            self.result = self.function(*self.arguments, **self.named)
        except Exception as error:
            last_exception = error


def loop():
    while True:
        task = tasks.get()
        with torch.inference_mode():
            task.work()
        task.finished.set()


def run_and_wait_result(function, *arguments, **named):
    global thread
    if thread is None or not thread.is_alive():
        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
    task = Task(function, arguments, named)
    tasks.put(task)
    if not task.finished.wait(300):
        raise RuntimeError("Forge's main thread is dead")
    return task.result
