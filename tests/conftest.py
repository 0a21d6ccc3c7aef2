"""What holds for every test."""

from __future__ import annotations

import signal

# A runner in the background of a shell starts with Ctrl-C ignored, and what is ignored is passed on to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
