"""A worker of cells that trains nothing: it writes who worked, sleeps, fails or dies, as its job says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    job = json.loads(sys.argv[1])
    run, kind = Path(job["run"]), job.get("kind", "done")
    with (run / "tried").open("a") as file:
        file.write(f"{os.getppid()}\n")
    time.sleep(job.get("seconds", 0.0))
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "fails":
        (run / "failed.json").write_text(json.dumps({"reason": "no luck", "diverged": True}))
        return 6
    (run / "result.json").write_text(json.dumps({"by": os.getppid()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
