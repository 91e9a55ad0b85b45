"""Killed at random, it ends as if nothing had happened:
python tests/stress.py [--kills 20] [--workers-killed 10]

Runs the smoke preset undisturbed; then again with kill -9 of everything at random moments, the same command
each time; then with kill -9 of single worker processes while it records and while it evaluates.  Weights and
outcomes must be equal bit for bit.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def start(folder, *flags):
    command = [sys.executable, str(ROOT / "diwa.py"), "--preset", "smoke", "--device", "cpu"]
    command += ["--runs", str(folder), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def differences(a, b):
    """Names of results that differ between two run folders."""
    found = []
    for path in sorted(a.glob("*.pt")):
        mine, other = (torch.load(folder / path.name, weights_only=True) for folder in (a, b))
        for key in ("model", "actor"):
            if key in mine and not all(torch.equal(mine[key][name], other[key][name]) for name in mine[key]):
                found.append(f"{path.name}/{key}")
    for path in a.glob("eval_*.json"):
        mine, other = (json.loads((folder / path.name).read_text()) for folder in (a, b))
        found += [f"{path.name}/{key}" for key in ("results", "curve") if mine[key] != other[key]]
    return found


def processes_below(pid):
    """All processes that a process has started, and those that they have."""
    text = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in text.splitlines()[1:]]
    found = [pid]
    for one in found:
        found += [child for child, parent in parents if parent == one]
    return found[1:]


def killed_at_random(folder, kills, seconds, rng):
    """Kill the whole program `kills` times, then let it end.
    -> how often it had ended before it was killed"""
    early = 0
    for _ in range(kills):
        process = start(folder)
        try:
            process.wait(rng.uniform(0.5, seconds / 2))
            early += 1
            shutil.rmtree(folder)                           # begin anew: there is nothing left to kill
        except subprocess.TimeoutExpired:
            for pid in [*processes_below(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()
    process = start(folder)
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"after {kills} kills it ended with {process.returncode}: {error}")
    return early


def workers_killed(folder, kills, rng):
    """Kill one worker at a time, half of them while it records, half while it evaluates.
    -> list of (seconds until it ended, what it said)"""
    seen = []
    for i in range(kills):
        stage = "play" if i < kills // 2 else "eval"
        if stage == "eval":
            for name in ("play", "demos", "wm", "bc", "reward", "finetune"):
                start(folder, "--stage", name).wait()
        process = start(folder, "--stage", stage, *(["--play_frames", "2000"] if stage == "play" else []))
        workers = []
        # below the program: the fork server; below that: workers
        while not workers and process.poll() is None:
            time.sleep(0.02)
            below = processes_below(process.pid)
            workers = [pid for pid in below if any(pid in processes_below(other) for other in below)]
        time.sleep(rng.uniform(0, 1))
        if process.poll() is None:
            os.kill(rng.choice(workers), signal.SIGKILL)
            began = time.time()
            _, error = process.communicate(timeout=60)
            seen.append((time.time() - began, process.returncode, error.strip()))
        else:
            seen.append((0, process.returncode, "had ended before"))
    process = start(folder)
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"it ended with {process.returncode}: {error}")
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers-killed", type=int, default=10)
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("undisturbed", "killed", "workers")]
        began = time.time()
        if start(folders[0]).wait():
            raise SystemExit("the undisturbed run failed")
        seconds = time.time() - began
        early = killed_at_random(folders[1], arguments.kills, seconds, rng)
        apart = differences(folders[0] / "smoke", folders[1] / "smoke")
        verdict = "differs in " + ", ".join(apart) if apart else "equal bit for bit"
        print(f"{arguments.kills} kills ({early} came too late): {verdict}", flush=True)
        seen = workers_killed(folders[2], arguments.workers_killed, rng)
        for wait, code, error in seen:
            print(f"a worker killed: exit code {code} after {wait:.1f} s: {error[:160]}")
        apart += differences(folders[0] / "smoke", folders[2] / "smoke")
        verdict = "differs in " + ", ".join(apart) if apart else "equal bit for bit"
        print(f"then to the end: {verdict}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
