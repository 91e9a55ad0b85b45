"""data.py: one format for everything that was recorded.

A dataset is a folder of plain arrays, N frames long, that are memory-mapped when read:

    rgb_static.npy   [N, S, S, 3] u8     rgb_gripper.npy [N, S, S, 3] u8
    robot_obs.npy    [N, 15] f32         scene_obs.npy   [N, 24] f32, optional: a robot in a kitchen has none
    rel_actions.npy  [N, 7]  f32         the action given AT the frame; it leads to the next one
    ep_start_end_ids.npy [E, 2] i64      first and last frame of each episode, both INCLUSIVE (as in CALVIN)
    meta.json                            source, renderer, image size, seed, versions, and the task segments

Names, layout and units are CALVIN's (20 mm and 0.05 rad a unit of action, gripper -1 close / +1 open).  The
built-in tabletop and the CALVIN importer write this format, and training reads nothing else.

    python data.py import task_D_D/training --out data/calvin_d     CALVIN's files -> one packed dataset
    python data.py inspect data/calvin_d                            what is in it, and a picture of it
"""
import contextlib
import functools
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from calvin_sim import HOME, TASKS, advance_target, success
from support.files import InputError, replace_folder, write_atomic, writing

FIELDS = {  # name: (shape of one frame, dtype); S is the image size
    "rgb_static": (("S", "S", 3), np.uint8),
    "rgb_gripper": (("S", "S", 3), np.uint8),
    "robot_obs": ((15,), np.float32),
    "scene_obs": ((24,), np.float32),
    "rel_actions": ((7,), np.float32),
}
OPTIONAL = ("scene_obs",)


# ------------------------------------------------------------------------------------------------------------
# Writing: files appear whole or not at all, so that a kill in the middle never leaves half a dataset that
# looks like one.

def save_part(path, episode):
    """Write one recorded episode (a dict of the FIELDS) as an .npz; numpy's own default keys."""
    write_atomic(path, lambda p: np.savez(p, **episode))


def frame_bytes(size):
    """Bytes that one frame takes in a dataset with pictures of `size` pixels a side."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in sized_fields(size).values())


def pack(parts, out, meta, segments=None):
    """Concatenate recorded episodes into a dataset folder.

    parts: paths of .npz files, one an episode, each with the FIELDS (scene_obs may be missing in all).
    segments: for each episode one (task, first, last), frame numbers within it, or None; or None for all.
    Writes through plain files: a memory map would crash the program on a full disk, without a word."""
    out = Path(out)
    if not parts:
        raise InputError(f"there is nothing to pack into {out}: not one episode was recorded")
    if segments and len(segments) != len(parts):
        raise InputError(f"{len(segments)} segments for {len(parts)} episodes: give one for each, or None")
    lengths = [len(np.load(p)["rel_actions"]) for p in parts]
    ends = np.cumsum(lengths)
    ids = np.stack([ends - lengths, ends - 1], 1).astype(np.int64)                       # [E, 2]
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(out), contextlib.ExitStack() as stack:
        temporary.mkdir(parents=True)
        files = {}
        size = np.load(parts[0])["rgb_static"].shape[1]
        for part, length in zip(parts, lengths):
            with np.load(part) as episode:
                frames = {key: episode[key] for key in FIELDS if key in episode or key not in OPTIONAL}
            if files and files.keys() != frames.keys():
                raise InputError(f"{part}: give scene_obs in all episodes or in none")
            for key, values in frames.items():
                shape, dtype = sized_fields(size)[key]
                if values.shape != (length, *shape) or not np.can_cast(values.dtype, dtype, "same_kind"):
                    raise InputError(f"{part} holds {key} {values.dtype} {list(values.shape)} and {length} "
                                     f"rel_actions: give {np.dtype(dtype)} {[length, *shape]}")
                if key == "rel_actions" and (np.abs(values) > 1.001).any():
                    raise InputError(f"{part} holds an action of {np.abs(values).max():g}: give -1 to 1")
                if key not in files:
                    files[key] = stack.enter_context(open(temporary / f"{key}.npy", "wb"))
                    npy_start(files[key], (int(ends[-1]), *shape), dtype)
                files[key].write(np.ascontiguousarray(values, dtype))
        np.save(temporary / "ep_start_end_ids.npy", ids)
        placed = []
        for (first, end), segment in zip(ids.tolist(), segments or ()):
            if segment:
                task, a, b = segment
                placed.append([task, first + a, first + b])
                if not 0 <= a <= b <= end - first:
                    raise InputError(f"segment {segment} does not fit into its {end - first + 1} frames")
        versions = dict(numpy=np.__version__, written=time.strftime("%Y-%m-%d"))
        meta = dict(meta, frames=int(ends[-1]), image_size=size, segments=placed, **versions)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    replace_folder(temporary, out)


def npy_start(file, shape, dtype):
    """Write an .npy header.  -> its length in bytes"""
    header = dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)), fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def sized_fields(size):
    """FIELDS with the image size filled in: {name: (shape of one frame, dtype)}."""
    return {key: (tuple(size if d == "S" else d for d in shape), dtype)
            for key, (shape, dtype) in FIELDS.items()}


# ------------------------------------------------------------------------------------------------------------
# Reading

class Dataset:
    """A recorded dataset, memory-mapped.

    ds["robot_obs"] is an array [N, 15]; ds.episodes is [E, 2] with inclusive ends; ds.segments is a list of
    (task, first, last) frame numbers, both inclusive; ds.meta is the content of meta.json.

    frames_in: the folder of the frames, if they lie in another one than the index (somebody's --data).
    Without scene state (no scene_obs.npy, or nothing but zeros in it) has_scene is False and ds["scene_obs"]
    is zero."""

    def __init__(self, path, frames_in=None):
        self.path = Path(path)
        if not (self.path / "meta.json").exists():
            raise InputError(f"there is no dataset in {self.path} (meta.json is missing): record one with "
                             "--stage play and --stage demos, or import CALVIN with 'python data.py import'")
        self.arrays = {}
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            folder = Path(frames_in or self.meta.get("frames_in") or self.path)
            for key in FIELDS:
                if key not in OPTIONAL or (folder / f"{key}.npy").exists():
                    self.arrays[key] = np.load(folder / f"{key}.npy", mmap_mode="r")
            self.episodes = np.load(self.path / "ep_start_end_ids.npy")
            self.segments = [tuple(s) for s in self.meta["segments"]]
            self.frames = int(self.meta["frames"])
            self.image_size = int(self.meta["image_size"])
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the dataset in {self.path} is damaged ({type(error).__name__}: {error}): "
                             f"delete the folder and record or import it again") from error
        self.arrays.setdefault("scene_obs", np.broadcast_to(np.float32(0), (self.frames, 24)))
        self.check()
        self.has_scene = bool(np.any(self.arrays["scene_obs"]))

    def check(self):
        n = self.frames
        for key, (shape, dtype) in sized_fields(self.image_size).items():
            have = self.arrays[key]
            want = (n, *shape)
            if have.shape != want or have.dtype != dtype:
                raise InputError(f"{self.path}/{key}.npy holds {have.dtype} {have.shape} where "
                                 f"{np.dtype(dtype)} {want} is expected: "
                                 "delete the folder and record or import it again")
        for key in ("robot_obs", "scene_obs", "rel_actions"):
            bad = np.flatnonzero(~np.isfinite(self.arrays[key]).all(1))
            if len(bad):
                raise InputError(f"{self.path}/{key}.npy has a NaN or infinity at frame {bad[0]} "
                                 f"({len(bad)} frames): delete the folder and record or import it again")
        if len(self.episodes) == 0 or self.episodes.min() < 0 or self.episodes.max() >= n:
            raise InputError(f"{self.path}/ep_start_end_ids.npy names frames outside 0..{n - 1}: "
                             "delete the folder and record or import it again")

    def __getitem__(self, key):
        return self.arrays[key]

    def __len__(self):
        return self.frames

    def split(self):
        """Episodes [E1, 2] to train on and [E2, 2] to test on.

        Every tenth is held out, so both cover the whole recording."""
        test = np.arange(len(self.episodes)) % HELD_OUT == HELD_OUT - 1
        if not test.any():
            raise InputError(f"{self.path} has {len(self.episodes)} episodes, too few to hold one out of "
                             f"{HELD_OUT}: record more play")
        return self.episodes[~test], self.episodes[test]

    def window_length(self, most=73):
        """Frames of a window as long as an evaluation, or the longest that both kinds of episodes have."""
        return min(most, *((part[:, 1] - part[:, 0]).max() + 1 for part in self.split()))


HELD_OUT = 10                                               # one episode of so many


def window_starts(episodes, length):
    """First frames of all windows of `length` frames that stay inside one episode.

    episodes: [E, 2], ends inclusive -> [W] i64."""
    starts = [np.arange(a, b - length + 2) for a, b in episodes if b - a + 1 >= length]
    if not starts:
        raise InputError(f"no episode is {length} frames long: record longer episodes or choose a smaller "
                         "--wm_length or --wm_stride")
    return np.concatenate(starts)


def action_chunks(actions, episodes, horizon):
    """The next `horizon` actions at every frame.

    Past an episode's end the motion is zero and the gripper keeps its command.
    actions: [N, 7] -> chunks [N, horizon, 7]; frames outside the given episodes are zero."""
    chunks = np.zeros((len(actions), horizon, 7), np.float32)
    for a, b in episodes:
        tail = np.repeat(actions[b:b + 1] * np.array([0, 0, 0, 0, 0, 0, 1], np.float32), horizon, 0)
        padded = np.concatenate([actions[a:b + 1], tail])                                # [L + horizon, 7]
        for k in range(horizon):
            chunks[a:b + 1, k] = padded[k:k + b - a + 1]
    return chunks


@functools.lru_cache(maxsize=None)
def area_weights(n, size):
    """How much of each input pixel lies under each output pixel when n pixels become size.

    -> [q, p] f32, with p / q = n / size: 200 -> 64 repeats itself every 25 -> 8 pixels, and one such block is
    all of the matrix that is not zero: 8 times less work.
    The weights are whole numbers, an input pixel being q wide and an output pixel p, so nothing is rounded
    before the end."""
    p = n // math.gcd(n, size)
    q = size // math.gcd(n, size)
    left_in = np.arange(p) * q
    left_out = np.arange(q)[:, None] * p
    overlap = np.minimum(left_in + q, left_out + p) - np.maximum(left_in, left_out)      # [q, p]
    return np.maximum(overlap, 0).astype(np.float32)


def area_resize(image, size):
    """Average the exact area under each output pixel, as OpenCV's INTER_AREA does when it shrinks.

    Fractions of pixels are included.  image: [H, W, 3] u8 -> [size, size, 3] u8, rounded.
    A policy must see the simulator through this same function."""
    h, w, c = image.shape
    if h == w == size:
        return image
    rows = area_weights(h, size)
    columns = area_weights(w, size)
    x = rows @ image.reshape(-1, rows.shape[1], w * c).astype(np.float32)               # [H / p, q, W * 3]
    x = x.reshape(size, w, c).transpose(1, 0, 2)                                        # [W, size, 3]
    x = x.reshape(-1, columns.shape[1], size * c)                                       # [W / p, p, size * 3]
    x = (columns @ x).reshape(size, size, c).transpose(1, 0, 2)                         # [size, size, 3]
    return np.rint(x / (rows.shape[1] * columns.shape[1])).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# A dataset as the world model reads it.  Two things that the plain arrays leave open are settled here, once,
# for training, dreams and the robot alike: which action belongs to which frame (the one executed BEFORE it),
# and where the arm was told to be (the commanded pose, which no camera sees).

HOME_POSE = torch.tensor([0.03, -0.23, 0.55, math.pi, 0.0, math.pi / 2])  # m, rad: the tool points down
HOME_JOINTS = torch.tensor(HOME, dtype=torch.float32)
POSE_SCALE = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3, 0.3])
STATE_SCALE = torch.tensor([0.15, 0.1, 0.02, 0.05, 0.5, 0.5])           # what moves or shines: m, or 0/1


def wrap(angle):
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def encode_pose(pose):
    """TCP pose [..., 6] in m and rad -> about unit scale, continuous where roll jumps from pi to -pi."""
    home = HOME_POSE.to(pose)
    position = pose[..., :3] - home[:3]
    rotation = wrap(pose[..., 3:] - home[3:])
    return torch.cat([position, rotation], -1) / POSE_SCALE.to(pose)                     # [..., 6]


def decode_pose(code):
    return code * POSE_SCALE.to(code) + HOME_POSE.to(code)


def encode_proprio(robot_obs):
    """CALVIN's robot_obs [..., 15] -> the same 15 numbers at about unit scale."""
    pose = encode_pose(robot_obs[..., :6])
    width = robot_obs[..., 6:7] / 0.04 - 1
    joints = (robot_obs[..., 7:14] - HOME_JOINTS.to(robot_obs)) / 0.5
    command = robot_obs[..., 14:15]
    return torch.cat([pose, width, joints, command], -1)                                 # [..., 15]


def encode_command(target, gripper):
    """Commanded pose [..., 6] and last gripper command [..., 1] -> c [..., 7]."""
    return torch.cat([encode_pose(target), gripper], -1)


SHOWN = 5                                # frames at a segment's end that show success, where no rule can tell


class Recording:
    """A dataset as the world model wants it: actions shifted by one, commanded poses, proprioception, the
    state of what moves or shines, and codes where the encoder is linear.

    Frames stay on the host; batch() moves windows to the device."""

    def __init__(self, cfg, dataset, wm=None):
        self.cfg = cfg
        self.ds = dataset
        robot = np.array(dataset["robot_obs"])
        actions = np.array(dataset["rel_actions"])
        # CALVIN's own recordings hold the measured motion, not the command: how far the target led the arm is
        # unknown, so each action starts from where the arm is
        self.keeps_target = dataset.meta.get("keeps_target", dataset.meta.get("source") != "calvin")
        begin = dataset.meta.get("first_targets") if self.keeps_target else None
        target = commanded_targets(robot, actions, dataset.episodes, self.keeps_target, begin)   # [N, 6]
        before = np.concatenate([np.zeros((1, 7), np.float32), actions[:-1]])            # executed before it
        first = dataset.episodes[:, 0]
        before[first] = 0
        gripper = before[:, 6:].copy()
        gripper[first] = robot[first, 14:15]
        self.target = torch.from_numpy(target)
        self.action = torch.from_numpy(before)
        self.command = encode_command(self.target, torch.from_numpy(gripper))
        self.proprio = encode_proprio(torch.from_numpy(robot))
        self.scene = np.array(dataset["scene_obs"])
        self.state = torch.from_numpy(self.scene[:, :len(STATE_SCALE)]) / STATE_SCALE
        self.codes = None
        if wm is not None and wm.codec:
            self.encode(wm)

    def has_rule(self, task):
        """Can CALVIN's rule tell success here?  It needs the scene state, and a task that it knows."""
        return self.ds.has_scene and task in TASKS

    def success(self, task, start, frames):
        """Is the task done at `frames`, seen from frame `start`?  -> bool of their common shape

        Without a rule it is done in the last five frames of a segment of that name, because whoever cut it
        there says so."""
        start, frames = np.broadcast_arrays(start, frames)
        if self.has_rule(task):
            return success(task, self.scene[start], self.scene[frames])
        done = np.zeros(len(self.ds), bool)
        for name, _, last in self.ds.segments:
            if name == task:
                done[last - SHOWN + 1:last + 1] = True
        return done[frames] & ~done[start]

    @torch.no_grad()
    def encode(self, wm):
        device = wm.codec.static_mean.device
        parts = []
        for a in range(0, len(self.ds), 2000):
            both = (np.array(self.ds[key][a:a + 2000]) for key in ("rgb_static", "rgb_gripper"))
            frames = [torch.from_numpy(pictures).to(device) for pictures in both]
            parts.append(wm.codec.encode(*frames).cpu())
        self.codes = torch.cat(parts)                                                    # [N, k]

    def batch(self, frames):
        """frames [..., T] of frame numbers, wm_stride apart -> tensors on the device.

        action, command [..., T, stride * 7]: those that led to each frame.
        The first action of a window is erased: nothing came before it."""
        frames = np.asarray(frames)
        device = self.cfg.device
        steps = frames[..., None] + np.arange(1 - self.cfg.wm_stride, 1)                 # [..., T, stride]
        steps[..., 0, :] = frames[..., :1]
        steps = torch.from_numpy(steps)
        index = torch.from_numpy(frames)
        out = {k: getattr(self, k)[steps].flatten(-2).to(device) for k in ("action", "command")}
        out["action"][..., 0, :] = 0
        for k in ("proprio", "state"):
            out[k] = getattr(self, k)[index].to(device)
        if self.codes is not None:
            out["codes"] = self.codes[index].to(device)
        else:
            for k in ("rgb_static", "rgb_gripper"):
                pictures = self.ds[k][frames.reshape(-1)]                                # [... * T, S, S, 3]
                out[k] = torch.from_numpy(pictures.reshape(*frames.shape, *pictures.shape[1:])).to(device)
        return out


def commanded_targets(robot_obs, actions, episodes, keep=True, first_targets=None):
    """Integrate the commands exactly as the simulator does, all episodes together.  -> [N, 6] f32

    target[t+1] = advance(target[t], action[t], measured tcp[t]); without `keep` from tcp[t].
    first_targets [E, 6]: of pieces that were cut out of episodes; else an arm begins at rest."""
    target = np.zeros((len(robot_obs), 6), np.float32)
    first = episodes[:, 0]
    lengths = episodes[:, 1] - first + 1
    target[first] = robot_obs[first, :6] if first_targets is None else first_targets
    for t in range(lengths.max() - 1):
        now = first[lengths > t + 1] + t
        target[now + 1] = advance_target(target[now], actions[now], robot_obs[now, :6], keep)
    return target


if __name__ == "__main__":
    from support.data_command import main
    sys.exit(main())
