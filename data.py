"""data.py: one format for everything that was recorded.

A dataset is a folder of plain arrays, N frames long, that are memory-mapped when read:

    rgb_static.npy   [N, S, S, 3] u8     rgb_gripper.npy [N, S, S, 3] u8
    robot_obs.npy    [N, 15] f32         scene_obs.npy   [N, 24] f32
    rel_actions.npy  [N, 7]  f32         the command given AT the frame; it leads to the next one
    ep_start_end_ids.npy [E, 2] i64      first and last frame of each episode, both INCLUSIVE (CALVIN's convention)
    meta.json                            source, renderer, image size, seed, versions, and the task segments

Names, layout and units are CALVIN's (20 mm and 0.05 rad a unit of action, gripper -1 close / +1 open).  The built-in
tabletop and the CALVIN importer write this format, and training reads nothing else.
"""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

FIELDS = {  # name: (shape of one frame, dtype); S is the image size
    "rgb_static": (("S", "S", 3), np.uint8),
    "rgb_gripper": (("S", "S", 3), np.uint8),
    "robot_obs": ((15,), np.float32),
    "scene_obs": ((24,), np.float32),
    "rel_actions": ((7,), np.float32),
}


class InputError(Exception):
    """Something that the user gave cannot be used.  The message is one sentence: what, where, and what to type next."""


# ----------------------------------------------------------------------------------------------------------------------
# Writing: files appear whole or not at all, so that a kill in the middle never leaves half a dataset that looks like one.

def write_atomic(path, write):
    """Call write(temporary path), then rename it to path: a reader sees the old file or the new one, never a torn one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free some disk space or choose another --runs folder, "
                         f"then run the same command again (finished work is kept)") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_part(path, episode):
    """Write one recorded episode (a dict of the FIELDS) as an .npz; numpy's own default keys."""
    write_atomic(path, lambda p: np.savez(p, **episode))


def pack(parts, out, meta, segments=None):
    """Concatenate recorded episodes into a dataset folder.

    parts: paths of .npz files, one an episode.  segments: one (task, first, last) an episode, frame numbers within it, or None.
    """
    out = Path(out)
    lengths = [len(np.load(p)["rel_actions"]) for p in parts]
    ends = np.cumsum(lengths)
    ids = np.stack([ends - lengths, ends - 1], 1).astype(np.int64)                       # [E, 2]
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    arrays = {}
    for (first, last), part in zip(ids, parts):
        with np.load(part) as episode:
            for key in FIELDS:
                value = episode[key]
                if key not in arrays:
                    arrays[key] = np.lib.format.open_memmap(temporary / f"{key}.npy", "w+", FIELDS[key][1],
                                                            (int(ends[-1]),) + value.shape[1:])
                arrays[key][first:last + 1] = value
    for array in arrays.values():
        array.flush()
    size = int(arrays["rgb_static"].shape[1])
    np.save(temporary / "ep_start_end_ids.npy", ids)
    placed = [] if segments is None else [[task, int(ids[i, 0]) + a, int(ids[i, 0]) + b] for i, (task, a, b) in enumerate(segments)]
    meta = dict(meta, frames=int(ends[-1]), image_size=size, segments=placed, numpy=np.__version__, written=time.strftime("%Y-%m-%d"))
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

class Dataset:
    """A recorded dataset, memory-mapped.  ds["robot_obs"] is an array [N, 15]; ds.episodes is [E, 2] with inclusive ends;
    ds.segments is a list of (task, first, last) frame numbers, both inclusive; ds.meta is the content of meta.json."""

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "meta.json").exists():
            raise InputError(f"there is no dataset in {self.path} (meta.json is missing): record one with --stage play and --stage demos, "
                             f"or import CALVIN with 'python data.py import'")
        self.arrays = {}
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            for key, (_, dtype) in FIELDS.items():
                self.arrays[key] = np.load(self.path / f"{key}.npy", mmap_mode="r")
            self.episodes = np.load(self.path / "ep_start_end_ids.npy")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"the dataset in {self.path} is damaged ({error}): delete the folder and record or import it again") from error
        self.segments = [tuple(s) for s in self.meta["segments"]]
        self.check()

    def check(self):
        n, s = self.meta["frames"], self.meta["image_size"]
        for key, (shape, dtype) in FIELDS.items():
            want = (n,) + tuple(s if d == "S" else d for d in shape)
            if self.arrays[key].shape != want or self.arrays[key].dtype != dtype:
                raise InputError(f"{self.path}/{key}.npy holds {self.arrays[key].dtype} {self.arrays[key].shape} where {np.dtype(dtype)} {want} "
                                 f"is expected: delete the folder and record or import it again")
        for key in ("robot_obs", "scene_obs", "rel_actions"):
            bad = np.flatnonzero(~np.isfinite(self.arrays[key]).all(1))
            if len(bad):
                raise InputError(f"{self.path}/{key}.npy has a NaN or infinity at frame {bad[0]} ({len(bad)} frames): "
                                 f"delete the folder and record or import it again")
        if len(self.episodes) == 0 or self.episodes.min() < 0 or self.episodes.max() >= n:
            raise InputError(f"{self.path}/ep_start_end_ids.npy names frames outside 0..{n - 1}: delete the folder and record or import it again")

    def __getitem__(self, key):
        return self.arrays[key]

    def __len__(self):
        return self.meta["frames"]

    def split(self, held_out):
        """Episodes [E1, 2] to train on and [E2, 2] to test on: every 1/held_out-th one is held out, so both cover the whole recording."""
        every = max(2, round(1 / held_out))
        test = np.arange(len(self.episodes)) % every == every - 1
        if not test.any():
            raise InputError(f"{self.path} has {len(self.episodes)} episodes, too few to hold one out of {every}: record more play")
        return self.episodes[~test], self.episodes[test]


def window_starts(episodes, length):
    """First frames of all windows of `length` frames that stay inside one episode.  episodes: [E, 2], ends inclusive -> [W] i64."""
    starts = [np.arange(a, b - length + 2) for a, b in episodes if b - a + 1 >= length]
    if not starts:
        raise InputError(f"no episode is {length} frames long: record longer episodes or choose a smaller --wm_length")
    return np.concatenate(starts)


def action_chunks(actions, episodes, horizon):
    """The next `horizon` actions at every frame; past an episode's end the motion is zero and the gripper keeps its command.

    actions: [N, 7] -> chunks [N, horizon, 7]; frames outside the given episodes are zero."""
    chunks = np.zeros((len(actions), horizon, 7), np.float32)
    for a, b in episodes:
        tail = np.repeat(actions[b:b + 1] * np.array([0, 0, 0, 0, 0, 0, 1], np.float32), horizon, 0)
        padded = np.concatenate([actions[a:b + 1], tail])                                # [L + horizon, 7]
        for k in range(horizon):
            chunks[a:b + 1, k] = padded[k:k + b - a + 1]
    return chunks
