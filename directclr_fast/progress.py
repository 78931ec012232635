"""How far a run is: a tqdm bar on a terminal, elsewhere lines. For the trainer, bench, compare."""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import IO


class Progress:
    """``with Progress(total) as progress``: ``to`` moves it, ``say`` prints where there is no bar.

    ``start``: what is done already, of ``total``. ``banner`` is printed first; ``show`` False shows
    nothing at all. ``file`` gets the lines (None: stdout), ``settings`` are tqdm's.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        show: bool = True,
        banner: str | None = None,
        file: IO | None = None,
        **settings,
    ) -> None:
        self.total, self.show, self.file = total, show, file
        self.next, self.said = start, None  # where a line is due, where the last one was
        self.bar = None
        if show and banner is not None:
            print(banner, flush=True)
        if show and sys.stderr.isatty() and shutil.get_terminal_size().columns >= 40:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                settings = {"unit": "step", "dynamic_ncols": True, **settings}
                self.bar = tqdm(total=total, initial=start, **settings)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def to(self, done: int, text: str, line: str | None = None) -> None:
        """``text`` stands beside the bar, which never goes back. Where there is none, ``line`` is
        printed the first time, for every tenth of the total and at its end."""
        if self.bar is not None:
            self.bar.update(max(0, done - self.bar.n))
            self.bar.set_postfix_str(text)
        elif line is not None and done >= min(self.next, self.total) and done != self.said:
            self.say(line)
            self.next, self.said = done + max(1, self.total // 10), done

    def say(self, line: str) -> None:
        """Prints ``line`` where lines stand for the bar."""
        if self.show and self.bar is None:
            print(line, file=self.file, flush=True)
