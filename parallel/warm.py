"""What does the process import from which local ranks are forked? Whatever every rank needs."""

from parallel.spawn import silence_expected_warnings

silence_expected_warnings()  # before the imports that warn

import parallel.groups as _  # noqa: E402, F401  after the line above; for its imports
