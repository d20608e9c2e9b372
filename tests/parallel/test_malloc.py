"""Freed pieces go back to the system, and threads share one heap."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the C library's habits are glibc's"
)

# Between large pieces stand small ones that live on: what hinders a heap from shrinking.
MEMORY_KEPT = """
import sys
from pathlib import Path
import numpy as np
from parallel.malloc import give_back_pieces

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

if sys.argv[1] == "given back":
    give_back_pieces()
np.ones(16 << 20, np.uint8)  # its end is what the C library learns from
before, large, small = resident(), [], []
for _ in range(8):
    large.append(np.ones(16 << 20, np.uint8))
    small.append(np.ones(60_000, np.uint8))
del large
print(resident() - before)
"""

# Tells how many heaps malloc_info(3) lists after a thread has asked for memory.
HEAPS = """
import ctypes
import sys
import threading
from parallel.malloc import share_one_heap

libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "shared":
    share_one_heap()
thread = threading.Thread(target=lambda: libc.malloc(1000))
thread.start()
thread.join()
told = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, told)
libc.fclose(told)
"""


@pytest.mark.parametrize(("case", "kept"), [("given back", range(16)), ("kept", range(100, 200))])
def test_freed_pieces_are_given_back(case: str, kept: range) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_KEPT, case], check=True, capture_output=True, text=True
    )
    assert int(result.stdout) in kept


@pytest.mark.parametrize(("case", "heaps"), [("shared", 1), ("own", 2)])
def test_threads_share_one_heap(case: str, heaps: int, tmp_path: Path) -> None:
    told = tmp_path / "heaps.xml"
    subprocess.run([sys.executable, "-c", HEAPS, case, str(told)], check=True)
    assert told.read_text().count("<heap nr=") == heaps
