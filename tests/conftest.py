"""What the test files share: a tiny run of the whole program, made once for all of pytest's workers."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Two workers share two cores; and a process with another number of threads rounds differently
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import diwa
from support import evaluate, report, runs

# the smoke preset, and less of everything: only the plumbing is tested
TINY = ["--preset", "smoke", "--device", "cpu", "--task", "close_drawer", "--play_frames", "1000",
        "--play_episode", "100", "--play_replay", "1", "--demo_count", "4", "--wm_updates", "40",
        "--bc_updates", "20", "--reward_updates", "20", "--ft_iterations", "2", "--ft_chunks", "6",
        "--ft_horizon", "6", "--eval_episodes", "4", "--eval_steps", "20", "--eval_curve", "2"]
# and even less, for tests that go through all stages once more
HASTY = ["--wm_updates", "4", "--bc_updates", "4", "--reward_updates", "4", "--eval_steps", "8"]


def command(*flags, code=""):
    """The command line of the program, or of a few lines of code that call it."""
    program = ["-c", code] if code else [str(ROOT / "diwa.py")]
    return [sys.executable, *program, *map(str, flags)]


def shell(*flags, code="", timeout=240):
    """The program as a process of its own, until its end."""
    return subprocess.run(command(*flags, code=code), capture_output=True, text=True, timeout=timeout)


def made_once(tmp_path_factory, name, make):
    """A folder that make(folder) fills in one of pytest's workers, while the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent                                  # each worker has a folder of its own in there
    folder = base / name
    outcome = base / f"{name}.json"
    try:
        folder.mkdir()
    except FileExistsError:
        while not outcome.exists():
            time.sleep(0.1)
    else:
        error = "it was cut off"
        try:
            make(folder)
            error = ""
        finally:
            (base / f"{name}.new").write_text(json.dumps(error))
            (base / f"{name}.new").rename(outcome)
    assert json.loads(outcome.read_text()) == "", f"{name} could not be made, see the first test that failed"
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A finished run, made by the command line: its folder's parent. Tests that change it take a copy."""
    def make(folder):
        result = shell(*TINY, "--stage", "all", "--runs", folder)
        assert result.returncode == 0, result.stderr[-3000:]

    return made_once(tmp_path_factory, "done", make)


def copy_run(done, folder, *drop):
    """A copy of the finished run, without the named results; the parent of the copy."""
    shutil.copytree(done / "smoke", folder / "smoke", ignore=shutil.ignore_patterns(*drop, ".*.lock"))
    return folder


def config(folder, *flags):
    """The settings of that command line, checked."""
    flags = [*TINY, "--runs", str(folder), *flags]
    return runs.check_config(runs.parse(flags, diwa.Config, diwa.PRESETS, "", ""))


def main(folder, *flags):
    """diwa.main in this process."""
    return diwa.main([*TINY, "--runs", str(folder), *map(str, flags)])


@pytest.fixture
def no_pictures(monkeypatch):
    """Films and figures take most of a tiny run's time: for tests that look at other things."""
    monkeypatch.setattr(evaluate, "record_rollouts", lambda *a: None)
    for name in ("gif", "curves", "health"):
        monkeypatch.setattr(report, name, lambda *a: None)


def without_pictures(folder):
    """The same for a process of its own: code that runs the program in a folder."""
    return f"""
import sys
sys.path.insert(0, {str(folder)!r})
import diwa
from support import evaluate, report
evaluate.record_rollouts = report.gif = report.curves = report.health = lambda *a: None
sys.exit(diwa.main(sys.argv[1:]))
"""


def pytest_collection_modifyitems(items):
    """Tests of a finished run come last: of two workers one makes it while the other does the rest."""
    items.sort(key=lambda item: "done" in item.fixturenames)
