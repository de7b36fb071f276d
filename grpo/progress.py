"""What a step that takes long is doing, on one line of a terminal that is wiped afterwards."""

import contextlib
import threading
import time

PATIENCE = 10.0  # seconds before anything is shown
INTERVAL = 0.5  # seconds between updates
WIDTH = 24  # characters of the bar


def progress_line(step, phase, seconds, done, total):
    """The line: step, phase and seconds, and a bar of the micro-batches where any were begun."""
    line = f"step {step}: {phase}, {seconds:.0f} s"
    if total:
        filled = WIDTH * done // total
        line += f" [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} micro-batches"
    return line


@contextlib.contextmanager
def shown_progress(stream, look, patience=PATIENCE, interval=INTERVAL):
    """Around a step: after ``patience`` seconds shows ``look()`` on ``stream``, again and again until the step ends.

    look: gives (step, phase, micro-batches done, of how many), called in a thread. Nothing where ``stream`` is no
    terminal.
    """
    if stream is None or not stream.isatty():
        yield
        return
    ended, start = threading.Event(), time.monotonic()

    def show():
        width, pause = 0, patience
        while not ended.wait(pause):
            step, phase, done, total = look()
            line = progress_line(step, phase, time.monotonic() - start, done, total)
            width, pause = max(width, len(line)), interval
            stream.write(f"\r{line:<{width}}")
            stream.flush()
        if width:
            stream.write(f"\r{' ' * width}\r")
            stream.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
