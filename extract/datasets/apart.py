"""A look at an HDF5 file by another process first: HDF5's own library does not survive every damaged file.

In a damaged heap of texts it goes round in circles for ever; elsewhere a few bytes make it take gigabytes, or crash.
The process has little time, and memory for what the file's size allows, and reads all but the numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from whisper_at_cli.extract.errors import UsageError

CPU_SECONDS = 5  # and a second for every 20,000 texts, fifty times what they take
MEMORY_MB, MEMORY_TIMES = 256, 8  # so much, and so many times the file's size: a short text takes most in memory
PROGRAM = """
import json, os, resource, sys
import h5py, numpy
path, names, seconds, memory = sys.argv[1], sys.argv[2].split(), int(sys.argv[3]), int(sys.argv[4])
_, most = resource.getrlimit(resource.RLIMIT_CPU)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
if os.path.exists("/proc/self/statm"):
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
step = "open"
try:
    with h5py.File(path, "r") as file:
        step = "read"
        places = [file] + [file[name] for name in names if name in file]
        for place in places:
            for name in place.attrs:
                place.attrs.get_id(name).dtype
        for place in places[1:]:
            if isinstance(place, h5py.Dataset):
                place.shape, place.chunks, place.id.get_storage_size()
                if h5py.check_string_dtype(place.dtype) and place.dtype.kind == "O":
                    more = seconds + place.size // 20000
                    resource.setrlimit(resource.RLIMIT_CPU, (more if most < 0 else min(more, most), most))
                    place[()]
except BaseException as error:
    print(json.dumps([step, " ".join(str(error).split()) or type(error).__name__]))
"""


def run_program(arguments: list[str]) -> tuple[int, bytes]:
    """The program's exit status, negative where a signal ended it, and what it printed."""
    command = [sys.executable, "-P", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode, done.stdout


def look_apart(path: Path, names: tuple[str, ...]) -> None:
    """Raise UsageError where a process of its own cannot open a file and read layout and texts of these datasets."""
    memory = (MEMORY_MB << 20) + MEMORY_TIMES * path.stat().st_size
    arguments = [str(path.resolve()), " ".join(names), str(CPU_SECONDS), str(memory)]
    status, found = run_program(arguments)
    if status < 0:
        raise UsageError(f"{path} cannot be read: the file is corrupt; copy it again")
    if found:
        step, problem = json.loads(found)
        what = "is not a readable HDF5 file" if step == "open" else "cannot be read as a pack of waveforms"
        raise UsageError(f"{path} {what}: {problem}")
