"""A save that is killed at each of its file operations in turn; after each death, what is left.

_save_deaths.py FOLDER. In FOLDER is `checkpoint-2`; a save of step 4 with `keep=1` dies by SIGKILL
before its first operation, its second, and so on, until one lives. Prints as JSON, for each, the
step of the newest checkpoint that verifies, and those that are there.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import _saves
import torch

from fastalign import checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_and_die(folder, made, fatal):
    """Whether the save lived."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status == 0
    count, here = 0, str(folder)

    def die(event, arguments):
        nonlocal count
        if event in OPERATIONS and str(arguments[0]).startswith(here):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    checkpoint.save(folder, 4, *made, _saves.states(4), 1)
    os._exit(0)


def main():
    torch.set_num_threads(1)
    folder, found, lived = Path(sys.argv[1]), [], False
    made, copy = _saves.trained(4.0), folder.with_name("copy")
    checkpoint.save(folder.with_name("first"), 4, *made, _saves.states(4), 1)  # imports all
    while not lived:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        lived = save_and_die(copy, made, len(found) + 1)
        there = [path.name for path in checkpoint.checkpoints(copy)]
        found.append([checkpoint.newest_valid(copy).name, there])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
