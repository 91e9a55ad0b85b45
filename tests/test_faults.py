"""What goes wrong on the machines that people have: each kind of fault is answered by one sentence and exit
code 2, or simply works."""
import dataclasses
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import diwa
from conftest import HASTY, TINY, command, config, copy_run, main, without_pictures
from support import data_command, evaluate, record, report, runs

@pytest.fixture
def again(done, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return copy_run(done, tmp_path / "runs")


def sentence(capsys, *words):
    """What was printed on stderr is one sentence with these words."""
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text
    return text


def start(*flags, code=""):
    """The program as a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(*flags, code=code), **pipes)


# ------------------------------------------------------------------------------------------------------------
# B: a worker that dies

def deadly(job):
    os.kill(os.getpid(), signal.SIGKILL) if job == 2 else time.sleep(0.05)
    return job


def children(pid):
    """Processes below a process, the forkserver's too."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    found = [pid]
    for _ in range(4):
        found += [int(p) for p, parent in rows if int(parent) in found and int(p) not in found]
    return found[1:]


def test_a_dead_worker_is_noticed():
    cfg = diwa.Config(workers=2)
    began = time.time()
    with pytest.raises(data.InputError, match="a worker process of numbers died.*same command again"):
        list(runs.in_processes(cfg, deadly, range(8), "numbers"))
    assert time.time() - began < 30
    assert not [p for p in multiprocessing.active_children() if p.is_alive()], "the others have ended, too"


@pytest.mark.parametrize("stage, flags", [
    ("demos", ["--demo_count", "8"]),
    ("eval", ["--eval_episodes", "16", "--eval_curve", "0"]),
])
def test_a_killed_worker_ends_it_and_the_same_command_goes_on(again, stage, flags):
    words = [*TINY, "--runs", again, "--stage", stage, *flags]
    names = ["eval_close_drawer.json"]
    if stage == "demos":
        names = ["demos_close_drawer", "eval_close_drawer.json"]
    for name in names:
        path = again / "smoke" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = start(*words)
    workers = []
    # the forkserver is a child, its workers are children of that
    while len(workers) < 2 and process.poll() is None:
        time.sleep(0.05)
        first = children(process.pid)
        workers = [p for p in first if any(p in children(q) for q in first if q != p)]
    time.sleep(0.2)
    os.kill(workers[-1], signal.SIGKILL)
    killed = time.time()
    _, error = process.communicate(timeout=60)
    assert time.time() - killed < 10 and process.returncode == 2
    assert "died" in error and len(error.strip().splitlines()) == 1
    assert diwa.main([str(word) for word in words]) == 0


TRACES = []


def leave_a_trace(what):
    """What a simulator does: it remembers."""
    TRACES.append(what)
    if what == "bad":
        raise ValueError("said in the copy")
    if what == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    return len(TRACES), os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies a process safely")
def test_a_copy_of_the_process_takes_its_traces_with_it():
    first, second = runs.apart("calvin", leave_a_trace, 1), runs.apart("calvin", leave_a_trace, 2)
    assert first[0] == second[0] == 1 and len({first[1], second[1], os.getpid()}) == 3 and not TRACES
    with pytest.raises(ValueError, match="said in the copy"):
        runs.apart("calvin", leave_a_trace, "bad")
    with pytest.raises(data.InputError, match="copy of a worker process died"):
        runs.apart("calvin", leave_a_trace, "dead")


def test_a_script_without_a_main_guard_ends(tmp_path):
    script = tmp_path / "mine.py"
    flags = [*TINY, "--runs", str(tmp_path), "--stage", "demos", "--demo_count", "4"]
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport diwa\ndiwa.main({flags!r})\n")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90)
    assert "__main__" in result.stderr and "worker process" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------------------
# C, D: full disks and forbidden places

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_recording_that_does_not_fit_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "free_space", lambda path: 30_000_000)
    assert diwa.main([*TINY, "--runs", str(tmp_path), "--stage", "play"]) == 2
    sentence(capsys, "GB are free", "--runs", "(--play_frames)")
    assert not list(tmp_path.rglob("*.npz")), "nothing was recorded in vain"


def test_parts_of_other_settings_are_not_taken_over(tmp_path, capsys):
    """A recording that was cut off goes on with the same settings and begins anew with others: its parts are
    known by name only."""
    cfg = config(tmp_path)
    parts = tmp_path / "smoke" / "play.parts"
    wanted = {"play": (1_000_000, 10, 200)}
    record.drop_others(cfg, parts, wanted)
    part = parts / "play_1000000.npz"
    part.write_bytes(b"frames")
    record.drop_others(cfg, parts, wanted)
    assert part.exists() and "anew" not in capsys.readouterr().out
    others = [
        (dataclasses.replace(cfg, image_size=32), wanted),
        (dataclasses.replace(cfg, sim="calvin"), wanted),
        (cfg, {"play": (1_000_000, 10, 100)}),
    ]
    for other, lengths in others:
        part.write_bytes(b"frames")
        record.drop_others(other, parts, lengths)
        assert not part.exists() and "begins anew" in capsys.readouterr().out


def test_packing_writes_through_plain_files(tmp_path, monkeypatch):
    """A memory map on a full disk ends the process with a bus error; a plain file raises."""
    real = np.lib.format.open_memmap

    def only_reading(path, mode, **more):
        return real(path, mode, **more) if mode == "r" else pytest.fail("a map is written")

    monkeypatch.setattr(np.lib.format, "open_memmap", only_reading)
    frames = {key: np.zeros((3, *shape), dtype) for key, (shape, dtype) in data.sized_fields(8).items()}
    data.save_part(tmp_path / "0.npz", frames)
    data.pack([tmp_path / "0.npz"], tmp_path / "out", {})
    assert len(data.Dataset(tmp_path / "out")) == 3
    monkeypatch.setattr(data, "npy_start", full)
    with pytest.raises(data.InputError, match="cannot write .*No space left.*free some disk space"):
        data.pack([tmp_path / "0.npz"], tmp_path / "out", {})
    assert len(data.Dataset(tmp_path / "out")) == 3, "the old dataset is still there"


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or bool(os.system("unshare -m true 2>/dev/null")),
    reason="needs root and namespaces",
)
@pytest.mark.parametrize("mount, folder, words", [
    ("mount -t tmpfs -o size=12m none {}", "{}/r", ["GB are free"]),
    ("mount -t tmpfs -o size=4k none /dev/shm", "{}/r", ["/dev/shm", "--shm-size"]),
    ("mount -t tmpfs -o ro none {}", "{}/r", ["cannot write", "Read-only"]),
])
def test_real_disks(tmp_path, mount, folder, words):
    place = tmp_path / "disk"
    place.mkdir()
    script = (f"{mount.format(place)} && {sys.executable} {ROOT / 'diwa.py'} {' '.join(TINY)} "
              f"--runs {folder.format(place)} --stage demos")
    command = ["unshare", "-m", "sh", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    error = result.stderr
    assert result.returncode == 2 and len(error.strip().splitlines()) == 1, error
    assert all(word in error for word in words), error


def test_forbidden_places(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused = [
        (["--runs", tmp_path / "file"], ["file"]),
        (["--runs", tmp_path, "--run", "x" * 300], ["File name too long"]),
        (["--runs", "/proc/nowhere"], ["/proc/nowhere"]),
    ]
    for flags, words in refused:
        assert diwa.main([*TINY, "--stage", "demos", *map(str, flags)]) == 2
        sentence(capsys, *words)


def test_a_full_disk_at_the_pictures_keeps_the_evaluation(again, monkeypatch, capsys):
    import imageio
    before = (again / "smoke" / "eval_close_drawer.json").read_bytes()
    for gif in (again / "smoke").glob("rollout_*.gif"):
        gif.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(imageio, "mimsave", full)
        assert main(again, "--stage", "report") == 2
        sentence(capsys, "cannot write", ".gif", "free some disk space")
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        assert main(again, "--stage", "report") == 2
        sentence(capsys, "cannot write", ".png")
    assert main(again) == 0 and (again / "smoke" / "eval_close_drawer.json").read_bytes() == before
    assert len(list((again / "smoke").glob("rollout_*.gif"))) == 2


def test_finished_groups_of_an_evaluation_are_kept(again, monkeypatch):
    """A kill in the middle of an evaluation costs the episodes that were under way, not those that were
    done."""
    path = again / "smoke" / "eval_close_drawer.json"
    want = json.loads(path.read_text())
    path.unlink()
    real = evaluate.in_processes

    def only_the_first(cfg, f, jobs, name):
        return (result for result in list(real(cfg, f, jobs, name))[:1])

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "in_processes", only_the_first)
        with pytest.raises(KeyError):
            main(again, "--stage", "eval")
    assert not path.exists() and path.with_suffix(".partial.json").exists()
    asked = []

    def noted(cfg, f, jobs, name):
        asked.extend(jobs)
        return real(cfg, f, jobs, name)

    monkeypatch.setattr(evaluate, "in_processes", noted)
    assert main(again, "--stage", "eval") == 0
    assert "bc" not in [job["policy"] for job in asked[:1]] and json.loads(path.read_text()) == want
    assert not path.with_suffix(".partial.json").exists()


def test_inspecting_a_dataset_that_cannot_be_written(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    play = str(done / "smoke" / "play")
    assert data_command.main(["inspect", play]) == 2
    assert "--out sheet.png" in capsys.readouterr().err
    monkeypatch.undo()
    assert data_command.main(["inspect", play, "--out", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------
# E: what was refused leaves no trace

def test_a_refused_command_changes_no_settings(again, capsys):
    config = again / "smoke" / "config.json"
    before = config.read_text()
    flags = ["--run", "smoke", "--runs", str(again), "--task", "close_drawer"]
    assert diwa.main([*flags, "--stage", "report", "--seed", "5"]) == 2
    sentence(capsys, "seed=5")
    assert config.read_text() == before
    assert diwa.main(flags) == 0
    assert capsys.readouterr().out.count("skipped") == len(runs.PIPELINE)


# ------------------------------------------------------------------------------------------------------------
# F: nothing to judge with

def test_no_demonstrations_that_judge(tmp_path, no_pictures):
    assert main(tmp_path, *HASTY, "--play_replay", "0", "--play_episode", "50", "--demo_count", "2",
                "--eval_curve", "0", "--eval_episodes", "2", "--workers", "1") == 0
    text = (tmp_path / "smoke" / "report.md").read_text()
    assert "Replay share: not measured" in text and "nan" not in text.split("Open-loop")[0]


@pytest.fixture(scope="module")
def recording(done, tmp_path_factory):
    """Recorded play of one robot, with segments of close_drawer only, on which a task of another name is said
    to succeed at its end."""
    folder = tmp_path_factory.mktemp("robot")
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    return pack_recording(folder, play, demos, data.FIELDS, ["close_drawer"])


def pack_recording(folder, play, demos, fields, names):
    parts = [folder / f"{i}.npz" for i in range(8)]
    spans = []
    for i, part in enumerate(parts):
        _, a, b = demos.segments[i % len(demos.segments)]
        pieces = {key: np.concatenate([play[key][100 * i:100 * i + 100], demos[key][a:b + 1]])
                  for key in fields}
        data.save_part(part, pieces)
        spans.append((names[i % len(names)], 100, 100 + b - a))
    data.pack(parts, folder / "packed", dict(source="a robot", renderer="a camera"), spans)
    return folder / "packed"


def test_a_recording_without_annotations(recording, tmp_path, capsys):
    shutil.copytree(recording, tmp_path / "bare")
    meta = json.loads((tmp_path / "bare" / "meta.json").read_text())
    (tmp_path / "bare" / "meta.json").write_text(json.dumps(dict(meta, segments=[])))
    flags = ["--data", str(tmp_path / "bare"), "--sim", "none"]
    assert main(tmp_path, *flags, "--stage", "play") == 0 and main(tmp_path, *flags, "--stage", "wm") == 0
    assert main(tmp_path, *flags, "--stage", "demos") == 2
    assert "no segments of close_drawer" in capsys.readouterr().err


def test_all_tasks_are_those_of_the_recording(recording, tmp_path):
    flags = ["--data", str(recording), "--sim", "none"]
    assert main(tmp_path, *flags, "--stage", "play") == 0
    assert main(tmp_path, *flags, "--stage", "demos", "--task", "all") == 0
    folder = tmp_path / "smoke"
    assert (folder / "demos_close_drawer").exists() and not list(folder.glob("*open_drawer*"))


# ------------------------------------------------------------------------------------------------------------
# G: numbers out of range

@pytest.mark.parametrize("flag, value", [
    ("seed", -1), ("workers", 0), ("eval_steps", 3), ("bc_chunk", 80), ("eval_episodes", 0),
    ("wm_context", 0), ("ft_play", 6), ("ft_snapshot", 0), ("ft_minibatches", 0), ("ft_minibatches", 10 ** 6),
    ("wm_codes", 4000), ("image_size", 0), ("image_size", -64), ("demo_count", 0), ("wm_lr", "nan"),
    ("wm_lr", 0), ("wm_batch", 0), ("wm_length", 200), ("play_frames", 0), ("play_episode", 1),
    ("wm_stride", 0), ("ft_gamma", 1.5), ("bc_ema", -0.1), ("ft_std", 0.05), ("wm_decode", 0),
    ("reward_tau", 0), ("wm_h", 0), ("ft_horizon", 0), ("eval_curve", -1), ("ft_bc", "inf"),
    ("eval_episodes", 5001), ("eval_curve", 2501),
    ("wm_classes", 0), ("wm_heads", 101), ("ft_doubt", 1e7), ("wm_inverse", 1e7),
])
def test_numbers_out_of_range_are_refused_before_any_work(flag, value, tmp_path, capsys):
    assert diwa.main([*TINY, "--runs", str(tmp_path), f"--{flag}", str(value)]) == 2
    assert flag in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_every_number_of_every_preset_is_in_its_range():
    for name, settings in diwa.PRESETS.items():
        runs.check_config(diwa.Config(**{"run": "x", "preset": name, "device": "cpu", **settings}))


def test_no_learning_curve(again, no_pictures):
    assert main(again, "--eval_curve", "0") == 0
    assert json.loads((again / "smoke" / "eval_close_drawer.json").read_text())["curve"] == {}


# ------------------------------------------------------------------------------------------------------------
# H, K: a report that claims only what is so

def test_a_robot_without_scene_state_gets_a_dreamed_policy(done, tmp_path):
    """Nothing but frames, robot_obs and actions; a task of another name, in segments that end with
    success."""
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    fields = [key for key in data.FIELDS if key != "scene_obs"]
    robot = pack_recording(tmp_path, play, demos, fields, ["pour_tea", "close_lid"])
    assert not (robot / "scene_obs.npy").exists() and not data.Dataset(robot).has_scene
    assert main(tmp_path, *HASTY, "--data", str(robot), "--sim", "none", "--task", "pour_tea") == 0
    folder = tmp_path / "smoke"
    text = (folder / "report.md").read_text()
    row = json.loads((folder / "result_pour_tea.json").read_text())
    assert "start states" not in text and "CALVIN's task rule" not in text
    assert "nan" not in text.split("Open-loop")[0]
    assert "recorded first frames" in text and "which nobody has checked" in text
    assert "Replay share: not measured" in text
    assert "| drawer |" not in text and "| tcp |" in text
    assert row["replay_share"] == {} and sum(map(sum, row["trust"]["play"])) == 0
    assert (folder / "dream_pour_tea.gif").exists()
    assert report.main([str(folder / "result_pour_tea.json")]) == 0


def test_zeros_are_no_scene_state(done, tmp_path):
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    robot = pack_recording(tmp_path, play, demos, data.FIELDS, ["pour_tea"])
    array = np.load(robot / "scene_obs.npy")
    np.save(robot / "scene_obs.npy", 0 * array)
    assert not data.Dataset(robot).has_scene


def test_labels_by_a_rule_need_scene_state(done, tmp_path, capsys):
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    fields = [key for key in data.FIELDS if key != "scene_obs"]
    robot = pack_recording(tmp_path, play, demos, fields, ["pour_tea"])
    flags = ["--data", str(robot), "--sim", "none", "--task", "pour_tea"]
    for labels in ("predicate", "strict", "state"):
        assert main(tmp_path, *flags, "--reward_labels", labels) == 2
        sentence(capsys, "--reward_labels unlabelled", "scene")
    assert main(tmp_path, *flags, "--wm_state", "30") == 2
    sentence(capsys, "--wm_state 0", "scene")


@pytest.mark.parametrize("labels", ["predicate", "strict", "state"])
@pytest.mark.parametrize("task", ["pour_tea", "all"])
def test_labels_by_a_rule_need_a_rule(done, tmp_path, capsys, labels, task):
    """A task of one's own has none, although the recording tells the scene."""
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    robot = pack_recording(tmp_path, play, demos, data.FIELDS, ["close_drawer", "pour_tea"])
    flags = ["--data", str(robot), "--sim", "none", "--wm_state", "100", "--reward_labels", labels]
    assert main(tmp_path, *flags, "--task", task) == 2
    sentence(capsys, "no rule of pour_tea", "--reward_labels unlabelled")


def test_success_without_a_rule_is_a_segments_end(done, tmp_path):
    play = data.Dataset(done / "smoke" / "play")
    demos = data.Dataset(done / "smoke" / "demos_close_drawer")
    fields = [key for key in data.FIELDS if key != "scene_obs"]
    robot = data.Dataset(pack_recording(tmp_path, play, demos, fields, ["pour_tea"]))
    recording = diwa.Recording(diwa.Config(), robot)
    _, a, b = robot.segments[0]
    frames = np.arange(a, b + 1)
    assert recording.success("pour_tea", a, frames).tolist() == [False] * (b - a - 4) + [True] * 5
    late = recording.success("pour_tea", b - 2, frames)
    assert not late.any(), "seen from success itself, nothing has happened"
    assert not recording.success("wash_up", a, frames).any()


# ------------------------------------------------------------------------------------------------------------
# J, N: a dataset on a drive without links, or that moved

def test_no_links_and_a_dataset_may_move(recording, tmp_path, monkeypatch, capsys):
    def refuse(*a):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    def stages(place):
        for stage in ("play", "demos", "wm", "bc"):
            assert main(tmp_path, "--data", str(tmp_path / place), "--sim", "none", "--stage", stage) == 0

    shutil.copytree(recording, tmp_path / "here")
    stages("here")
    (tmp_path / "here").rename(tmp_path / "there")
    capsys.readouterr()
    stages("there")
    assert capsys.readouterr().out.count("skipped") == 4
    robot = np.load(tmp_path / "there" / "robot_obs.npy")
    robot[7, 0] += 0.001
    np.save(tmp_path / "there" / "robot_obs.npy", robot)
    runs.identity.cache_clear()
    assert main(tmp_path, "--data", str(tmp_path / "there"), "--sim", "none", "--stage", "play") == 0
    assert capsys.readouterr().out.count("skipped") == 0, "another recording is another run"


# ------------------------------------------------------------------------------------------------------------
# L: asserts are for tests

def test_no_assert_does_work():
    """python -O leaves asserts out."""
    import ast
    for path in sorted(ROOT.rglob("*.py")):
        if "tests" not in path.parts and ".venv" not in path.parts and "runs" not in path.parts:
            nodes = ast.walk(ast.parse(path.read_text()))
            assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)], path


# ------------------------------------------------------------------------------------------------------------
# M: two runs in one folder

def test_the_same_command_twice_at_once(tmp_path):
    """While one program is at a stage, another that wants the same result is refused; afterwards it goes
    on."""
    words = [*TINY, "--runs", tmp_path, "--stage", "demos", "--demo_count", "2"]
    with runs.alone(tmp_path / "smoke" / "demos_close_drawer", "demos"):
        second = start(*words)
        _, error = second.communicate(timeout=120)
        assert second.returncode == 2 and "another program" in error and "--run" in error
        assert len(error.strip().splitlines()) == 1
    assert diwa.main([str(word) for word in words]) == 0
    assert len(data.Dataset(tmp_path / "smoke" / "demos_close_drawer").segments) == 2


def test_tasks_at_once_over_one_world_model(again):
    """Two tasks in one run folder at the same time: both end, and no row of the log is lost."""
    tasks = ("open_drawer", "turn_on_led")
    words = [*TINY, "--demo_count", "2", "--bc_updates", "4", "--reward_updates", "4", "--eval_steps", "8",
             "--eval_episodes", "2", "--eval_curve", "0", "--workers", "1", "--runs", again]
    before = (again / "smoke" / "log.csv").read_text().splitlines()
    processes = [start(*words, "--task", task, code=without_pictures(ROOT)) for task in tasks]
    assert [process.communicate(timeout=240)[1] for process in processes] == ["", ""]
    log = (again / "smoke" / "log.csv").read_text().splitlines()
    assert set(before) <= set(log)
    for task in tasks:
        assert (again / "smoke" / f"report_{task}.md").exists()
        stages = [stage for stage in runs.PIPELINE if runs.STAGES[stage][2]]
        assert all(any(line.startswith(f"{stage},{task},0,minutes,") for line in log) for stage in stages)


def test_many_may_write_the_log(tmp_path):
    """Tasks at work in one folder: a log that is begun anew by one loses no row of the others."""
    tasks = "open_drawer", "close_drawer", "turn_on_led"

    def write(task):
        cfg = diwa.Config(runs=str(tmp_path), run="r", task=task)
        for i in range(20):
            log = runs.Log(cfg, "bc", i)
            log(i + 1, dict(loss=float(i)))

    threads = [threading.Thread(target=write, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for task in tasks:
        cfg = diwa.Config(runs=str(tmp_path), run="r", task=task)
        assert runs.read_log(cfg, "bc", "loss") == (list(range(1, 21)), [float(i) for i in range(20)])


# ------------------------------------------------------------------------------------------------------------
# N: advice that can be followed

def test_the_advice_for_a_small_recording_works(done, tmp_path, capsys):
    """392 frames in six episodes, as many as CALVIN's smallest samples have."""
    play = data.Dataset(done / "smoke" / "play")
    parts = []
    first = 0
    for i, length in enumerate((100, 46, 75, 50, 48, 73)):
        parts.append(tmp_path / f"{i}.npz")
        data.save_part(parts[-1], {key: play[key][first:first + length] for key in data.FIELDS})
        first += 150
    meta = dict(source="a robot", renderer="a camera")
    data.pack(parts, tmp_path / "packed", meta, [("close_drawer", 0, 40)] * 6)
    flags = ["--data", str(tmp_path / "packed"), "--sim", "none", "--wm_length", "20"]
    if main(tmp_path, *flags, "--stage", "play") == 2:
        advised = re.search(r"give --wm_length (\d+)", capsys.readouterr().err).group(1)
        assert int(advised) >= 15, "and not less than it takes"
        flags[-1] = advised
    for stage in ("play", "demos", "wm"):
        assert main(tmp_path, *flags, "--stage", stage) == 0


# ------------------------------------------------------------------------------------------------------------
# N: small ones

@pytest.mark.parametrize("change, words", [
    (lambda s: s.update(wm_lr="fast"), ["config.json", "wm_lr", "float"]),
    (lambda s: s.update(wm_updats=3), ["wm_updats", "did you mean wm_updates"]),
    (lambda s: s.update(seed=1.5), ["seed", "int"]),
    (lambda s: s.update(preset="huge"), ["huge"]),
    (lambda s: s.clear(), None),
])
def test_config_json_edited_by_hand(again, capsys, change, words):
    path = again / "smoke" / "config.json"
    content = json.loads(path.read_text())
    change(content["settings"])
    path.write_text(json.dumps(content))
    code = diwa.main(["--run", "smoke", "--runs", str(again), "--task", "close_drawer", "--stage", "bc"])
    assert code == 2 and sentence(capsys, *(words or ["made with"]))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', "null"])
def test_config_json_torn(again, capsys, text):
    (again / "smoke" / "config.json").write_text(text)
    assert diwa.main(["--run", "smoke", "--runs", str(again), "--task", "close_drawer", "--stage", "bc"]) == 2
    sentence(capsys, "config.json")


def test_a_torn_log_is_read_as_far_as_it_goes(again, no_pictures):
    path = again / "smoke" / "log.csv"
    path.write_bytes(path.read_bytes() + b"wm,,12,im\nwm,,x,image,3\nwm,,13,image,\x00\xff\nwm,,14,image,4e")
    assert main(again, "--stage", "report") == 0
    assert main(again, "--stage", "finetune", "--ft_iterations", "3") == 0


@pytest.mark.parametrize("content", [None, "{", "{}", "[1]", '{"task": "open_drawer", "seed": 0}'])
def test_report_of_rows_that_are_none(tmp_path, capsys, content):
    path = tmp_path / "result_x.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    sentence(capsys, "result_x.json", "runs/*/result_*.json")


def test_an_empty_name_is_refused(tmp_path, capsys):
    assert diwa.main([*TINY, "--runs", str(tmp_path), "--run", ""]) == 2
    sentence(capsys, "--run")


def test_the_commit_of_another_repository_is_not_ours(tmp_path):
    shutil.copy(ROOT / "support" / "runs.py", tmp_path)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path)
    assert runs.commit(tmp_path / "runs.py") == "unknown"
    subprocess.run(["git", "add", "."], cwd=tmp_path)
    assert runs.commit(tmp_path / "runs.py").endswith("-dirty")
    subprocess.run([*git, "commit", "-q", "-m", "ours"], cwd=tmp_path)
    assert len(runs.commit(tmp_path / "runs.py")) in range(7, 13)
