"""data.py: the dataset, its samplers, the CALVIN import (whole, cut off, broken), and the command line."""
import errno
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import diwa  # noqa: E402
from data import InputError  # noqa: E402
from support import calvin_import, data_command, files, linear  # noqa: E402

EPISODES = [(100, 102), (103, 132), (140, 151)]      # does not start at 0, a first episode of 3 frames, a gap
FRAMES = 3 + 30 + 12


# ------------------------------------------------------------------------------------------------------------
# Small synthetic CALVIN folders

def calvin_frame(number, vectors=np.float64, static=50, gripper=21, **extra):
    """One frame in CALVIN's layout whose content tells its number."""
    rng = np.random.default_rng(number)
    action = np.append(rng.uniform(-1, 1, 6), 1 - 2 * (number % 2)).astype(vectors)
    return dict(
        actions=action,
        rel_actions=action,
        robot_obs=np.full(15, number, vectors),
        scene_obs=rng.normal(size=24).astype(vectors),
        rgb_static=rng.integers(0, 256, (static, static, 3), dtype=np.uint8),
        rgb_gripper=rng.integers(0, 256, (gripper, gripper, 3), dtype=np.uint8),
        **extra,
    )


def save_pickled(path, content, protocol=4):
    """What np.save(path, content, allow_pickle=True) writes, with a choice of pickle protocol."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), file, protocol=protocol)


def language(tasks, pairs):
    embedding = np.zeros((len(tasks), 1, 384), np.float32)
    return {
        "language": {"ann": list(tasks), "task": list(tasks), "emb": embedding},
        "info": {"episodes": [], "indx": pairs},
    }


def make_calvin(folder, episodes=EPISODES, lang=True, **options):
    """Write a CALVIN split -> its folder."""
    (folder / "lang_annotations").mkdir(parents=True)
    for a, b in episodes:
        for number in range(a, b + 1):
            np.savez(folder / f"episode_{number:07d}.npz", **calvin_frame(number, **options))
    np.save(folder / "ep_start_end_ids.npy", np.array(episodes))
    if lang:
        content = language(["open_drawer", "close_drawer"], [(105, 120), (140, 151)])
        save_pickled(folder / "lang_annotations" / "auto_lang_ann.npy", content)
    return folder


@pytest.fixture
def calvin(tmp_path):
    return make_calvin(tmp_path / "task_D_D" / "training")


def run(source, out, *flags):
    """The import in this process, where it is fast -> its exit code."""
    small = ["--image-size", "16", "--workers", "1"]
    return data_command.main(["import", str(source), "--out", str(out), *small, *flags])


def reference(numbers, key, size=16):
    values = [calvin_frame(n)[key] for n in numbers]
    if key.startswith("rgb"):
        return np.stack([data.area_resize(v, size) for v in values])
    return np.stack(values).astype(np.float32)


def assert_imported(out, numbers=tuple(n for a, b in EPISODES for n in range(a, b + 1))):
    ds = data.Dataset(out)
    for key in data.FIELDS:
        np.testing.assert_array_equal(ds[key], reference(numbers, key))
    return ds


# ------------------------------------------------------------------------------------------------------------
# The dataset and its samplers

def episode(length, seed=0, size=8):
    rng = np.random.default_rng(seed)
    content = {}
    for key, (shape, dtype) in data.FIELDS.items():
        if dtype is np.uint8:
            values = rng.integers(0, 256, (length, size, size, 3))
        else:
            values = rng.normal(size=(length, *shape)).clip(-1, 1)
        content[key] = values.astype(dtype)
    return content


def packed(tmp_path, lengths=(4, 9, 6), segments=None):
    episodes = [episode(n, seed) for seed, n in enumerate(lengths)]
    parts = [tmp_path / "parts" / f"{i}.npz" for i in range(len(lengths))]
    for path, e in zip(parts, episodes):
        data.save_part(path, e)
    data.pack(parts, tmp_path / "ds", {"source": "test", "renderer": "none", "seed": 0}, segments)
    return tmp_path / "ds", episodes


def test_a_picture_too_many_is_refused(tmp_path):
    """A common robot log has one observation more than actions: packed, it would shift all later episodes."""
    content = episode(5)
    data.save_part(tmp_path / "0.npz", dict(content, rel_actions=content["rel_actions"][:-1]))
    words = r"holds rgb_static uint8 \[5, 8, 8, 3\] and 4 rel_actions: give uint8 \[4, 8, 8, 3\]"
    with pytest.raises(data.InputError, match=words):
        data.pack([tmp_path / "0.npz"], tmp_path / "ds", {})
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("change, words", [
    (dict(rgb_static=np.zeros((5, 8, 8, 3), np.float32)), "rgb_static float32"),       # 0..1 would be black
    (dict(rgb_gripper=np.zeros((5, 9, 9, 3), np.uint8)), "rgb_gripper uint8 .*9, 9"),
    (dict(robot_obs=np.zeros((5, 14))), "robot_obs float64 .*14"),
    (dict(rel_actions=np.full((5, 7), 50.0)), "an action of 50"),
    (dict(scene_obs=None), "scene_obs in all episodes or in none"),
])
def test_what_training_could_not_use_is_not_packed(tmp_path, change, words):
    """The second of two episodes is not like the first."""
    content = {**episode(5), **change}
    data.save_part(tmp_path / "0.npz", episode(4))
    data.save_part(tmp_path / "1.npz", {key: value for key, value in content.items() if value is not None})
    with pytest.raises(data.InputError, match=f"1.npz.*{words}"):
        data.pack([tmp_path / "0.npz", tmp_path / "1.npz"], tmp_path / "ds", {})
    assert not (tmp_path / "ds").exists()


def test_a_folder_takes_the_place_of_a_link(tmp_path):
    """A variant's recordings are links: made anew, they become its own and the source stays."""
    for name in ("source", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    (tmp_path / "play").symlink_to(tmp_path / "source")
    files.replace_folder(tmp_path / "new", tmp_path / "play")
    assert (tmp_path / "play" / "which").read_text() == "new" and not (tmp_path / "play").is_symlink()
    assert (tmp_path / "source" / "which").read_text() == "source"


def test_components_need_frames():
    codec = linear.LinearCodec(diwa.Config(device="cpu", image_size=8, wm_codes=16))
    with pytest.raises(data.InputError, match="16 components of 9 frames.*--wm_codes 9"):
        codec.fit_camera("static", torch.zeros(9, 8, 8, 3, dtype=torch.uint8))


def test_pack_and_dataset_round_trip(tmp_path):
    path, episodes = packed(tmp_path, segments=[("a", 0, 3), ("b", 2, 8), ("a", 1, 5)])
    ds = data.Dataset(path)
    assert len(ds) == 19 and ds.episodes.tolist() == [[0, 3], [4, 12], [13, 18]]
    assert ds.segments == [("a", 0, 3), ("b", 6, 12), ("a", 14, 18)]
    assert ds.meta["source"] == "test" and ds.meta["image_size"] == 8 and ds.meta["seed"] == 0
    for key, (_, dtype) in data.FIELDS.items():
        assert isinstance(ds[key], np.memmap) and ds[key].dtype == dtype
        np.testing.assert_array_equal(ds[key], np.concatenate([e[key] for e in episodes]))
    assert not (tmp_path / "ds.tmp").exists()


def test_segments_are_one_an_episode_or_none(tmp_path):
    """An episode without a demonstration is None; a list of another length, or a segment that does not fit,
    is refused before anything is written."""
    path, _ = packed(tmp_path, segments=[None, ("b", 2, 8), None])
    assert data.Dataset(path).segments == [("b", 6, 12)]
    with pytest.raises(InputError, match="1 segments for 3 episodes"):
        packed(tmp_path / "short", segments=[("b", 2, 8)])
    with pytest.raises(InputError, match="does not fit into its 4 frames"):
        packed(tmp_path / "long", segments=[("b", 2, 8), None, None])
    assert not (tmp_path / "short" / "ds").exists() and not (tmp_path / "long" / "ds").exists()


def test_split_holds_out_whole_episodes_spread_over_the_recording(tmp_path):
    path, _ = packed(tmp_path, lengths=[2] * 20)
    train, test = data.Dataset(path).split()
    assert len(train) == 18 and test.tolist() == [[18, 19], [38, 39]]
    assert not {tuple(e) for e in train} & {tuple(e) for e in test}
    path, _ = packed(tmp_path / "small", lengths=[2] * 9)
    with pytest.raises(InputError, match="too few"):
        data.Dataset(path).split()


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_windows_never_cross_an_episode(length):
    episodes = np.array([[0, 3], [4, 12], [13, 13], [14, 18]])
    of = np.repeat(np.arange(4), [4, 9, 1, 5])                       # episode of each frame
    starts = data.window_starts(episodes, length)
    assert starts.tolist() == [s for s in range(19 - length + 1) if len(set(of[s:s + length])) == 1]
    with pytest.raises(InputError, match="10 frames long"):
        data.window_starts(episodes, 10)


def test_action_chunks_at_an_episodes_end_stand_still_and_keep_the_gripper():
    actions = np.arange(1, 43, dtype=np.float32).reshape(6, 7)
    actions[:, 6] = [1, 1, -1, 1, 1, 1]
    chunks = data.action_chunks(actions, np.array([[0, 2], [4, 5]]), 4)
    assert chunks.shape == (6, 4, 7)
    np.testing.assert_array_equal(chunks[0, :3], actions[:3])
    np.testing.assert_array_equal(chunks[1, 2:], [[0, 0, 0, 0, 0, 0, -1]] * 2)   # nothing of the next episode
    np.testing.assert_array_equal(chunks[2], np.vstack([actions[2], [[0, 0, 0, 0, 0, 0, -1]] * 3]))
    assert not chunks[3].any()                                       # a frame of no episode
    np.testing.assert_array_equal(chunks[5, 1:], [[0, 0, 0, 0, 0, 0, 1]] * 3)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    data.write_atomic(path, lambda p: p.write_text("old"))

    def half(p):
        p.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        data.write_atomic(path, half)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]


def replace_array(path, key, change):
    np.save(path / f"{key}.npy", change(np.load(path / f"{key}.npy")))


def array_with_nan(path):
    array = np.load(path / "robot_obs.npy")
    array[7] = np.nan
    np.save(path / "robot_obs.npy", array)


def array_with_infinity(path):
    replace_array(path, "rel_actions", lambda x: x / np.float32(0))


def truncated_array(path):
    array = path / "rgb_static.npy"
    array.write_bytes(array.read_bytes()[:400])


DAMAGE = {
    "NaN": (array_with_nan, "robot_obs.*NaN.*frame 7"),
    "infinity": (array_with_infinity, "rel_actions.*NaN or infinity"),
    "wrong shape": (lambda p: replace_array(p, "scene_obs", lambda x: x[:, :23]), "scene_obs.*23.*expected"),
    "wrong length": (lambda p: replace_array(p, "rgb_static", lambda x: x[1:]), "rgb_static.*18"),
    "wrong dtype": (lambda p: replace_array(p, "rgb_gripper", np.float32), "rgb_gripper.*float32.*uint8"),
    "missing array": (lambda p: (p / "robot_obs.npy").unlink(), "damaged"),
    "truncated array": (truncated_array, "damaged"),
    "broken meta": (lambda p: (p / "meta.json").write_text("{"), "damaged"),
    "no meta": (lambda p: (p / "meta.json").unlink(), "no dataset"),
    "episodes out of range": (lambda p: np.save(p / "ep_start_end_ids.npy", [[0, 19]]), "outside 0..18"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_dataset_refuses_damage(case, tmp_path):
    path, _ = packed(tmp_path)
    damage, sentence = DAMAGE[case]
    with np.errstate(all="ignore"):
        damage(path)
    with pytest.raises(InputError, match=sentence):
        data.Dataset(path)


# ------------------------------------------------------------------------------------------------------------
# Area averaging

@pytest.mark.parametrize("n, size", [(200, 64), (84, 64), (50, 16), (20, 32), (17, 13)])
def test_area_resize_is_the_exact_average(n, size):
    """Cut each pixel into size x size equal ones; then every output pixel is a plain mean, which torch
    computes."""
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (n, n, 3), dtype=np.uint8)
    rows = torch.from_numpy(image).double().permute(2, 0, 1)
    for _ in range(2):                                  # one axis at a time, or the fine image would be large
        fine = rows.repeat_interleave(size, 2)                       # [3, ., n * size]
        rows = torch.nn.functional.adaptive_avg_pool1d(fine, size).transpose(1, 2)
    exact = rows.permute(1, 2, 0).numpy()
    assert np.abs(data.area_resize(image, size) - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("n, size", [(200, 50), (84, 42), (64, 16), (30, 30)])
def test_area_resize_equals_torch_where_the_ratio_is_whole(n, size):
    """Elsewhere torch's mode="area" is another thing: it averages all pixels that an output pixel touches,
    with equal weights."""
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(1).integers(0, 256, (n, n, 3), dtype=np.uint8)
    batch = torch.from_numpy(image).double().permute(2, 0, 1)[None]
    there = torch.nn.functional.interpolate(batch, size=(size, size), mode="area")[0].permute(1, 2, 0).numpy()
    assert np.abs(data.area_resize(image, size) - there).max() <= 0.5 + 1e-9


# ------------------------------------------------------------------------------------------------------------
# The import

def test_import(calvin, tmp_path, capsys):
    assert run(calvin, tmp_path / "out") == 0
    ds = assert_imported(tmp_path / "out")
    assert ds.episodes.tolist() == [[0, 2], [3, 32], [33, 44]]
    assert ds.segments == [("open_drawer", 5, 20), ("close_drawer", 33, 44)]
    assert ds.meta["source"] == "calvin"
    assert ds.meta["renderer"] == "calvin dataset"
    assert ds.meta["split"] == "task_D_D/training"
    assert ds.meta["frames"] == FRAMES and ds.meta["image_size"] == 16 and ds.meta["numpy"] == np.__version__
    arrays = {f"{key}.npy" for key in data.FIELDS}
    assert set(os.listdir(tmp_path / "out")) == arrays | {"ep_start_end_ids.npy", "meta.json"}
    assert not (tmp_path / "out.tmp").exists()
    said = capsys.readouterr().out
    assert said.index("GB at 16 px") < said.index("frames/s")
    assert said.index("frames/s") < said.index("45 frames, 3 episodes, 2 segments")
    assert "minutes left" in said


def test_import_of_real_sizes_compressed_with_depth_and_float32(tmp_path):
    source = tmp_path / "training"
    source.mkdir()
    depth = np.zeros((200, 200), np.float32)
    touch = np.zeros((160, 120, 6), np.uint8)
    frame = calvin_frame(0, np.float32, 200, 84, depth_static=depth, rgb_tactile=touch)
    np.savez_compressed(source / "episode_0000000.npz", **frame)
    np.save(source / "ep_start_end_ids.npy", [[0, 0]])
    assert run(source, tmp_path / "out", "--image-size", "64") == 0
    ds = data.Dataset(tmp_path / "out")
    np.testing.assert_array_equal(ds["rgb_static"][0], data.area_resize(frame["rgb_static"], 64))
    np.testing.assert_array_equal(ds["rgb_gripper"][0], data.area_resize(frame["rgb_gripper"], 64))
    np.testing.assert_array_equal(ds["robot_obs"][0], frame["robot_obs"])
    assert ds.segments == []


def test_import_through_processes_from_the_command_line(calvin, tmp_path):
    command = [sys.executable, str(ROOT / "data.py"), "import", str(calvin), "--out", str(tmp_path / "out")]
    command += ["--image-size", "16", "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert_imported(tmp_path / "out")


def test_an_error_in_a_worker_process_is_one_sentence(calvin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calvin_import, "CHUNK", 8)
    (calvin / "episode_0000150.npz").write_bytes(b"PK")
    assert run(calvin, tmp_path / "out", "--workers", "2") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_import_leaves_out_annotations_without_frames(calvin, tmp_path, capsys):
    pairs = [(105, 120), (130, 141), (135, 138), (1, 9), (400, 464), (145, 152), (110, 108)]
    pairs.append(np.array([100, 102]))
    save_pickled(calvin / "lang_annotations" / "auto_lang_ann.npy", language(["t"] * 8, pairs))
    assert run(calvin, tmp_path / "out") == 0
    assert data.Dataset(tmp_path / "out").segments == [("t", 5, 20), ("t", 0, 2)]
    assert capsys.readouterr().out.count("6 of 8 language annotations") == 1


def test_import_without_or_with_empty_annotations(tmp_path, capsys):
    source = make_calvin(tmp_path / "training", lang=False)
    assert run(source, tmp_path / "a") == 0
    assert data.Dataset(tmp_path / "a").segments == [] and capsys.readouterr().out.count("warning") == 1
    save_pickled(source / "lang_annotations" / "auto_lang_ann.npy", language([], []))
    assert run(source, tmp_path / "b") == 0 and data.Dataset(tmp_path / "b").segments == []


def test_import_ignores_other_files_and_sorts_episodes(calvin, tmp_path):
    np.savez(calvin / "a_first.npz", x=1)
    np.savez(calvin / "episode_notes.npz", x=1)
    np.save(calvin / "ep_start_end_ids.npy", np.array(EPISODES[::-1], np.int32))
    assert run(calvin, tmp_path / "out") == 0
    assert_imported(tmp_path / "out")


def test_import_mends_old_gripper_zeros_and_says_so(calvin, tmp_path, capsys):
    for number, action in ((104, [0, 0, 0, 0, 0, 0, 0]), (105, [2, 0, 0, -3, 0, 0, 1])):
        frame = calvin_frame(number)
        np.savez(calvin / f"episode_{number:07d}.npz", **{**frame, "rel_actions": np.array(action, float)})
    assert run(calvin, tmp_path / "out") == 0
    actions = data.Dataset(tmp_path / "out")["rel_actions"]
    assert actions[4].tolist() == [0, 0, 0, 0, 0, 0, -1] and actions[5].tolist() == [1, 0, 0, -1, 0, 0, 1]
    assert "2 actions were mended" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_annotations_of_old_and_new_numpy(calvin, core, protocol):
    path = calvin / "lang_annotations" / "auto_lang_ann.npy"
    content = language(["a"], np.array([(100, 101)]))
    content["info"]["episodes"] = [np.int64(3), np.str_("x")]         # scalars need one more function
    save_pickled(path, content, protocol)
    if protocol == 3:                                      # names are plain lines there, and can be exchanged
        raw = path.read_bytes()
        raw = raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        path.write_bytes(raw.replace(b"numpy.core.multiarray", core))
        assert core + b"\n" in path.read_bytes()
    assert calvin_import.read_language(calvin, np.array(EPISODES)) == ([["a", 0, 1]], 0)


# ------------------------------------------------------------------------------------------------------------
# Cut off and resumed

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from support import calvin_import, data_command
calvin_import.CHUNK, read, count = 8, calvin_import.read_frame, [0]
def deadly(source, number):
    count[0] += 1
    if count[0] == 16 + 20:      # 16 frames are read to estimate the time, 16 make two chunks
        os.kill(os.getpid(), signal.SIGKILL)
    return read(source, number)
calvin_import.read_frame = deadly
data_command.main(["import", {source!r}, "--out", {out!r}, "--image-size", "16", "--workers", "1"])
"""


def kill_halfway(calvin, out):
    code = KILLED.format(root=str(ROOT), source=str(calvin), out=str(out))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists() and len(json.loads(Path(f"{out}.tmp/progress.json").read_text())["done"]) == 2


def count_conversions(monkeypatch):
    """Make calvin_import.import_chunk count the frames it converts -> the list of their numbers."""
    seen = []
    convert = calvin_import.import_chunk

    def counted(*job):
        seen.extend(job[2].tolist())
        return convert(*job)

    monkeypatch.setattr(calvin_import, "import_chunk", counted)
    return seen


def test_resume_after_kill_9(calvin, tmp_path, monkeypatch, capsys):
    kill_halfway(calvin, tmp_path / "out")
    monkeypatch.setattr(calvin_import, "CHUNK", 8)
    seen = count_conversions(monkeypatch)
    assert run(calvin, tmp_path / "out") == 0
    assert len(seen) == FRAMES - 16 and "2 of 6 chunks are finished" in capsys.readouterr().out
    assert_imported(tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists() and not (tmp_path / "out" / "progress.json").exists()


@pytest.mark.parametrize("change", ["size", "index", "progress", "array"])
def test_what_was_left_of_another_import_is_discarded(change, calvin, tmp_path, monkeypatch):
    kill_halfway(calvin, tmp_path / "out")
    monkeypatch.setattr(calvin_import, "CHUNK", 8)
    seen = count_conversions(monkeypatch)
    left = tmp_path / "out.tmp"
    if change == "index":
        np.save(calvin / "ep_start_end_ids.npy", np.array(EPISODES[:2]))
    elif change == "progress":
        (left / "progress.json").write_text('{"key"')
    elif change == "array":
        (left / "rgb_static.npy").unlink()
    assert run(calvin, tmp_path / "out", *(["--image-size", "8"] if change == "size" else [])) == 0
    assert len(seen) == len(data.Dataset(tmp_path / "out")) and not left.exists()


def test_a_frame_mended_later_resumes(calvin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calvin_import, "CHUNK", 8)
    path = calvin / "episode_0000150.npz"
    good = path.read_bytes()
    path.write_bytes(good[:-200])
    assert run(calvin, tmp_path / "out") == 2
    assert "episode_0000150.npz" in capsys.readouterr().err and not (tmp_path / "out").exists()
    path.write_bytes(good)
    seen = count_conversions(monkeypatch)
    assert run(calvin, tmp_path / "out") == 0 and len(seen) == 5     # the last chunk only
    assert_imported(tmp_path / "out")


def test_interrupt_and_existing_out(calvin, tmp_path, monkeypatch, capsys):
    def interrupt(*job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calvin_import, "import_chunk", interrupt)
        assert run(calvin, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    (tmp_path / "out").mkdir()                                       # an empty folder is no obstacle
    assert run(calvin, tmp_path / "out") == 0
    capsys.readouterr()
    assert run(calvin, tmp_path / "out") == 2 and "exists already" in capsys.readouterr().err
    assert_imported(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------
# Broken input: every case is one sentence that says where, exit code 2, and leaves nothing

def change_frame(**changes):
    """Rewrite frame 104 with changed keys; None drops the key."""
    def change(c):
        frame = {**calvin_frame(104), **changes}
        np.savez(c.source / "episode_0000104.npz", **{k: v for k, v in frame.items() if v is not None})
    return change


def set_index(ids):
    return lambda c: np.save(c.source / "ep_start_end_ids.npy", ids)


def set_language(content):
    return lambda c: save_pickled(c.source / "lang_annotations" / "auto_lang_ann.npy", content)


def cut(name, keep):
    return lambda c: (c.source / name).write_bytes((c.source / name).read_bytes()[:keep])


def flip_a_byte(c):
    raw = bytearray((c.source / "episode_0000104.npz").read_bytes())
    raw[5000] ^= 255
    (c.source / "episode_0000104.npz").write_bytes(raw)


def nest(c):
    (c.source / "training").mkdir()
    (c.source / "ep_start_end_ids.npy").rename(c.source / "training" / "ep_start_end_ids.npy")


def full_disk_at_once(c):
    usage = namedtuple("usage", "total used free")
    c.patch.setattr(data.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))


def frame_as_folder(c):
    (c.source / "episode_0000104.npz").unlink()
    (c.source / "episode_0000104.npz").mkdir()


def missing_frames(c):
    for number in (110, 111):
        (c.source / f"episode_{number:07d}.npz").unlink()


def annotation_of_text(c):
    (c.source / "lang_annotations" / "auto_lang_ann.npy").write_text("hello")


def annotation_of_numbers(c):
    np.save(c.source / "lang_annotations" / "auto_lang_ann.npy", np.zeros(3))


def moved_away(c):
    c.source.rename(c.source.with_name("moved"))


def missing_index(c):
    (c.source / "ep_start_end_ids.npy").unlink()


def no_frames(c):
    for path in c.source.glob("*.npz"):
        path.unlink()


def something_at_out(c):
    c.out.mkdir(parents=True)
    (c.out / "mine").write_text("")


def full_disk_while_writing(c):
    """A file that cannot be written stands in for the full disk: /dev/full says 'No space left on device' to
    every write."""
    begin = calvin_import.begin

    def begin_on_full_disk(temporary, *rest):
        state = begin(temporary, *rest)
        (temporary / "rgb_static.npy").unlink()
        (temporary / "rgb_static.npy").symlink_to("/dev/full")
        return state
    c.patch.setattr(calvin_import, "begin", begin_on_full_disk)


def no_permission(c):
    """Taken from the system call, since a test that runs as root could write to a read-only folder."""
    def refuse(self, *rest, **more):
        raise PermissionError(errno.EACCES, "Permission denied")
    c.patch.setattr(data.Path, "mkdir", refuse)


NAN = np.append(np.zeros(14), np.nan)
BROKEN = {  # name: (what is done to the good folder, words that the sentence must hold)
    "missing folder": (moved_away, "no folder .*training.*: give the"),
    "missing index": (missing_index, "ep_start_end_ids.npy is missing: download"),
    "folder above the splits": (nest, "one split at a time, here .*training.training"),
    "index truncated": (cut("ep_start_end_ids.npy", 140), "ep_start_end_ids.npy cannot be used"),
    "index empty": (cut("ep_start_end_ids.npy", 0), "ep_start_end_ids.npy cannot be used"),
    "index of wrong shape": (set_index(np.arange(6)), r"ep_start_end_ids.npy cannot be used.*\(6,\)"),
    "index without episodes": (set_index(np.zeros((0, 2), int)), "ep_start_end_ids.npy cannot be used"),
    "index of wrong dtype": (
        set_index(np.array(EPISODES, float)),
        "ep_start_end_ids.npy cannot be used.*float64",
    ),
    "ids reversed": (set_index([(100, 102), (132, 103)]), r"reversed, \[132, 103\]"),
    "ids overlapping": (set_index([(100, 110), (110, 120)]), "overlap, at frame 110"),
    "ids negative": (set_index([(-5, 102)]), "out of range, -5 to 102, .*100 to 151"),
    "ids out of range": (set_index([(100, 10**15)]), "out of range, 100 to 1000000000000000, .*100 to 151"),
    "no frame files": (no_frames, "frame files .*absent"),
    "missing frame file": (missing_frames, "0000110.npz is missing .2 of 45 frame files"),
    "gap in an episode": (set_index([(100, 151)]), "0000133.npz is missing .7 of 52 frame files"),
    "frame truncated": (cut("episode_0000104.npz", 3000), "0000104.npz cannot be read"),
    "frame empty": (cut("episode_0000104.npz", 0), "0000104.npz cannot be read"),
    "frame with a flipped byte": (flip_a_byte, "0000104.npz cannot be read.*CRC"),
    "frame that is a folder": (frame_as_folder, "0000104.npz cannot be read"),
    "missing key": (change_frame(scene_obs=None), "0000104.npz lacks the key scene_obs"),
    "vector of wrong shape": (
        change_frame(robot_obs=np.zeros(14)),
        r"0000104.npz holds robot_obs as float64 \(14,\) where float32 or float64 \(15,\)",
    ),
    "vector of wrong dtype": (
        change_frame(rel_actions=np.zeros(7, int)),
        "0000104.npz holds rel_actions as int64",
    ),
    "vector of objects": (change_frame(rel_actions=np.array([None] * 7)), "0000104.npz cannot be read"),
    "image of wrong shape": (
        change_frame(rgb_static=np.zeros((50, 40, 3), np.uint8)),
        r"0000104.npz holds rgb_static as uint8 \(50, 40, 3\)",
    ),
    "image without pixels": (
        change_frame(rgb_static=np.zeros((0, 0, 3), np.uint8)),
        "0000104.npz holds rgb_static",
    ),
    "image of one number": (change_frame(rgb_static=np.uint8(3)), "0000104.npz holds rgb_static"),
    "image of wrong dtype": (
        change_frame(rgb_gripper=np.zeros((21, 21, 3), np.float32)),
        "0000104.npz holds rgb_gripper as float32",
    ),
    "NaN frame": (change_frame(robot_obs=NAN), "0000104.npz has a NaN or infinity in robot_obs"),
    "number too big for float32": (
        change_frame(robot_obs=np.full(15, 1e300)),
        "0000104.npz has a NaN or infinity in robot_obs",
    ),
    "annotation truncated": (cut("lang_annotations/auto_lang_ann.npy", 300), "auto_lang_ann.npy is refused"),
    "annotation not .npy": (annotation_of_text, "auto_lang_ann.npy is refused"),
    "annotation of numbers": (annotation_of_numbers, "auto_lang_ann.npy is refused.*float64"),
    "annotation without language": (
        set_language({"info": {"indx": []}}),
        "auto_lang_ann.npy is refused.*language",
    ),
    "annotation that is a list": (set_language(["a", "b"]), "auto_lang_ann.npy is refused"),
    "annotation of unequal lengths": (
        set_language(language(["a"], [(100, 102), (103, 104)])),
        "auto_lang_ann.npy is refused.*1 long, is not one name",
    ),
    "annotation of ragged pairs": (
        set_language(language(["a", "b"], [(100, 102), (103,)])),
        "auto_lang_ann.npy is refused",
    ),
    "annotation with tasks of numbers": (
        set_language(language([1], [(100, 102)])),
        "auto_lang_ann.npy is refused",
    ),
    "out exists": (something_at_out, "out exists already.*delete it or choose another --out"),
    "out under a file": (lambda c: c.out.parent.write_text(""), "cannot write .*choose an --out folder"),
    "no permission": (no_permission, "cannot write .*Permission denied; choose an --out"),
    "disk too small": (full_disk_at_once, "GB are free: free some, or choose --out"),
    "disk full while writing": (full_disk_while_writing, "cannot write .*No space left on device; free some"),
    "image size": (lambda c: c.flags.extend(["--image-size", "4"]), "--image-size 4 .*out of range"),
    "workers": (lambda c: c.flags.extend(["--workers", "0"]), "--workers 0 is out of range"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_clear_sentence(case, calvin, tmp_path, monkeypatch, capsys):
    if case == "disk full while writing" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    c = namedtuple("Case", "source out patch flags")(calvin, tmp_path / "below" / "out", monkeypatch, [])
    BROKEN[case][0](c)
    kept = sorted(c.out.iterdir()) if c.out.is_dir() else None
    assert run(calvin, c.out, *c.flags) == 2
    monkeypatch.undo()
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and len(sentence) < 500
    assert re.search(BROKEN[case][1], sentence), sentence
    assert (sorted(c.out.iterdir()) if c.out.is_dir() else None) == kept
    assert not Path(f"{c.out}.tmp").exists()


class Payload:
    """Unpickled naively, this creates the file it was given."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


PLACES = ["in the dictionary", "in an array", "instead of it", "in a frame", "in the index"]


@pytest.mark.parametrize("where", PLACES)
def test_a_crafted_pickle_does_not_run(where, calvin, tmp_path, capsys):
    marker = tmp_path / "the payload ran"
    payload = Payload(marker)
    content = language(["a"], [(100, 101)])
    if where == "in the dictionary":
        content["info"]["episodes"] = [payload]
    elif where == "in an array":
        content["language"]["emb"] = np.array([payload, None], dtype=object)
    path = calvin / "lang_annotations" / "auto_lang_ann.npy"
    if where == "in the index":
        path = calvin / "ep_start_end_ids.npy"
    if where == "in a frame":
        path = calvin / "episode_0000104.npz"
        np.savez(path, **{**calvin_frame(104), "rel_actions": np.array([payload] * 7)})
    else:
        save_pickled(path, content if where in ("in the dictionary", "in an array") else payload)
    assert run(calvin, tmp_path / "out") == 2
    assert not marker.exists() and not (tmp_path / "out").exists()
    sentence = capsys.readouterr().err
    assert path.name in sentence and sentence.count("\n") == 1
    if path.name == "auto_lang_ann.npy":
        assert "it asks to run io.open" in sentence and "was not run" in sentence
        with open(path, "rb") as file:                              # the payload is a real one: run it to see
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            pickle.load(file)
        assert marker.exists()


@pytest.mark.parametrize("module, name", [
    ("os", "system"),
    ("builtins", "eval"),
    ("numpy", "load"),
    ("numpy", "memmap"),
    ("numpy.core.multiarray", "fromfile"),
])
def test_the_unpickler_knows_nothing_else(module, name):
    with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name}"):
        calvin_import.PlainUnpickler(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()


# ------------------------------------------------------------------------------------------------------------
# inspect, and the command line

@pytest.mark.parametrize("lang", [True, False])
def test_inspect_prints_and_draws(lang, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(make_calvin(tmp_path / "training", lang=lang), tmp_path / "out") == 0
    capsys.readouterr()
    assert data_command.main(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "45 frames" in said
    assert "16 px" in said
    assert "3 episodes of 3 to 30 frames" in said
    assert "source: calvin" in said
    assert ("open_drawer" in said) == lang
    line = next(line for line in said.splitlines() if "robot_obs x" in line)
    assert line.split()[2:] == ["100.0000", "to", "151.0000"]
    assert said.count("rel_actions ") == 7
    assert said.count("robot_obs ") == 15
    assert said.count("scene_obs ") == 24
    from matplotlib.image import imread
    picture = imread(tmp_path / "out" / "contact_sheet.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.1


COMMANDS = {
    "import a --ouput b": "--ouput is not understood, did you mean --out",
    "import a --out b --imagesize 64": "--imagesize is not understood, did you mean --image-size",
    "import a --out b --image_size=64": "did you mean --image-size",
    "import a --out b --worker 3": "did you mean --workers",
    "import a --out b --zzz": "--zzz is not understood",
    "import a": "--out data/calvin_d",
    "import a --out b --workers many": "argument --workers: invalid int value: 'many'",
    "imprt a --out b": "invalid choice: 'imprt'",
    "": "required: command",
    "inspect": "required: folder",
    "inspect nowhere": "there is no dataset in nowhere",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line_errors_are_one_sentence(command, capsys):
    assert data_command.main(command.split()) == 2
    said = capsys.readouterr()
    assert COMMANDS[command] in said.err and said.err.count("\n") == 1 and said.out == ""


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        data_command.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("import", "inspect", "--out", "--image-size", "--workers"))
