"""What does the process import from which local ranks are forked? Whatever every rank needs."""

import signal

from parallel.spawn import silence_expected_warnings

# A signal to the whole process group is for the ranks: without this process nobody could tell how
# they end.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
silence_expected_warnings()  # before the imports that warn

import parallel.groups as _  # noqa: E402, F401  after the line above; for its imports
