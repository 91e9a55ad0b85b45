"""data.py: one format for everything that was recorded.

A dataset is a folder of plain arrays, N frames long, that are memory-mapped when read:

    rgb_static.npy   [N, S, S, 3] u8     rgb_gripper.npy [N, S, S, 3] u8
    robot_obs.npy    [N, 15] f32         scene_obs.npy   [N, 24] f32, optional: a robot in a kitchen has none
    rel_actions.npy  [N, 7]  f32         the command given AT the frame; it leads to the next one
    ep_start_end_ids.npy [E, 2] i64      first and last frame of each episode, both INCLUSIVE (CALVIN's convention)
    meta.json                            source, renderer, image size, seed, versions, and the task segments

Names, layout and units are CALVIN's (20 mm and 0.05 rad a unit of action, gripper -1 close / +1 open).  The built-in
tabletop and the CALVIN importer write this format, and training reads nothing else.

    python data.py import task_D_D/training --out data/calvin_d     the official CALVIN files -> one packed dataset
    python data.py inspect data/calvin_d                            what is in it, and a picture of it
"""
import argparse
import concurrent.futures
import contextlib
import difflib
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

FIELDS = {  # name: (shape of one frame, dtype); S is the image size
    "rgb_static": (("S", "S", 3), np.uint8),
    "rgb_gripper": (("S", "S", 3), np.uint8),
    "robot_obs": ((15,), np.float32),
    "scene_obs": ((24,), np.float32),
    "rel_actions": ((7,), np.float32),
}
OPTIONAL = ("scene_obs",)


class InputError(Exception):
    """Something that the user gave cannot be used.  The message is one sentence: what, where, and what to type next."""


# ----------------------------------------------------------------------------------------------------------------------
# Writing: files appear whole or not at all, so that a kill in the middle never leaves half a dataset that looks like one.

ELSEWHERE = "free some disk space or choose another --runs folder, then run the same command again (finished work is kept)"


@contextlib.contextmanager
def writing(path, advice=ELSEWHERE):
    """Whatever the file system refuses inside becomes one sentence: what, where, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_atomic(path, write, advice=ELSEWHERE):
    """Call write(temporary path), then rename it to path: a reader sees the old file or the new one, never a torn one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    with writing(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def save_part(path, episode):
    """Write one recorded episode (a dict of the FIELDS) as an .npz; numpy's own default keys."""
    write_atomic(path, lambda p: np.savez(p, **episode))


def frame_bytes(size):
    """Bytes that one frame takes in a dataset with pictures of `size` pixels a side."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in sized_fields(size).values())


def free_space(path):
    """Bytes that are free where `path` is, or will be."""
    return shutil.disk_usage(next(p for p in [Path(path).absolute(), *Path(path).absolute().parents] if p.is_dir())).free


def pack(parts, out, meta, segments=None):
    """Concatenate recorded episodes into a dataset folder.

    parts: paths of .npz files, one an episode, each with the FIELDS (scene_obs may be missing in all of them).
    segments: one (task, first, last) an episode, frame numbers within it, or None.
    Writes through plain files: a memory map would crash the program on a full disk, without a word."""
    out = Path(out)
    if not parts:
        raise InputError(f"there is nothing to pack into {out}: not one episode was recorded")
    lengths = [len(np.load(p)["rel_actions"]) for p in parts]
    ends = np.cumsum(lengths)
    ids = np.stack([ends - lengths, ends - 1], 1).astype(np.int64)                       # [E, 2]
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(out), contextlib.ExitStack() as stack:
        temporary.mkdir(parents=True)
        files = {}
        for part in parts:
            with np.load(part) as episode:
                frames = {key: episode[key] for key in FIELDS if key in episode or key not in OPTIONAL}
            for key, values in frames.items():
                dtype = FIELDS[key][1]
                if key not in files:
                    files[key] = stack.enter_context(open(temporary / f"{key}.npy", "wb"))
                    npy_start(files[key], (int(ends[-1]), *values.shape[1:]), dtype)
                files[key].write(np.ascontiguousarray(values, dtype))
        size = int(frames["rgb_static"].shape[1])
        np.save(temporary / "ep_start_end_ids.npy", ids)
        placed = []
        for first, (task, a, b) in zip(ids[:, 0], segments or ()):
            placed.append([task, int(first) + a, int(first) + b])
        meta = dict(meta, frames=int(ends[-1]), image_size=size, segments=placed, numpy=np.__version__, written=time.strftime("%Y-%m-%d"))
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    replace_folder(temporary, out)


def npy_start(file, shape, dtype):
    """Write an .npy header.  -> its length in bytes"""
    header = dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)), fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def replace_folder(temporary, out):
    """Put a finished folder in the place of an old one."""
    with writing(out):
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

class Dataset:
    """A recorded dataset, memory-mapped.  ds["robot_obs"] is an array [N, 15]; ds.episodes is [E, 2] with inclusive ends;
    ds.segments is a list of (task, first, last) frame numbers, both inclusive; ds.meta is the content of meta.json.

    frames_in: the folder of the frames, if they lie in another one than the index (play that is somebody's --data).
    Without scene state (no scene_obs.npy, or nothing but zeros in it) has_scene is False and ds["scene_obs"] is zero."""

    def __init__(self, path, frames_in=None):
        self.path = Path(path)
        if not (self.path / "meta.json").exists():
            raise InputError(f"there is no dataset in {self.path} (meta.json is missing): record one with --stage play and "
                             f"--stage demos, or import CALVIN with 'python data.py import'")
        self.arrays = {}
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            folder = Path(frames_in or self.meta.get("frames_in") or self.path)
            for key in FIELDS:
                if key not in OPTIONAL or (folder / f"{key}.npy").exists():
                    self.arrays[key] = np.load(folder / f"{key}.npy", mmap_mode="r")
            self.episodes = np.load(self.path / "ep_start_end_ids.npy")
            self.segments = [tuple(s) for s in self.meta["segments"]]
            self.frames, self.image_size = int(self.meta["frames"]), int(self.meta["image_size"])
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the dataset in {self.path} is damaged ({type(error).__name__}: {error}): "
                             f"delete the folder and record or import it again") from error
        self.arrays.setdefault("scene_obs", np.broadcast_to(np.float32(0), (self.frames, 24)))
        self.check()
        self.has_scene = bool(np.any(self.arrays["scene_obs"]))

    def check(self):
        n, s = self.frames, self.image_size
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
        return self.frames

    def split(self):
        """Episodes [E1, 2] to train on and [E2, 2] to test on: every tenth is held out, so both cover the whole recording."""
        test = np.arange(len(self.episodes)) % HELD_OUT == HELD_OUT - 1
        if not test.any():
            raise InputError(f"{self.path} has {len(self.episodes)} episodes, too few to hold one out of {HELD_OUT}: record more play")
        return self.episodes[~test], self.episodes[test]

    def judging_length(self, most):
        """Frames of the windows that judge: `most`, or the longest that both kinds of episodes have."""
        return min(most, *((part[:, 1] - part[:, 0]).max() + 1 for part in self.split()))


HELD_OUT = 10                                               # one episode of so many


def window_starts(episodes, length):
    """First frames of all windows of `length` frames that stay inside one episode.  episodes: [E, 2], ends inclusive -> [W] i64."""
    starts = [np.arange(a, b - length + 2) for a, b in episodes if b - a + 1 >= length]
    if not starts:
        raise InputError(f"no episode is {length} frames long: record longer episodes or choose a smaller --wm_length, --wm_stride or --play_episode")
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


# ----------------------------------------------------------------------------------------------------------------------
# Importing CALVIN.  Its folder holds one compressed .npz a FRAME, 50 kB each: far too slow to train from.  Unpacking a frame
# costs about 1 ms, once; everything below is built to add little to that.

CHUNK = 128        # frames a worker converts at a time: the unit of resuming, and 3 MB of its memory at 64 px
NPY_START = 128    # bytes of header that numpy gives the arrays made here
AGAIN = "download it again, then run the same command (finished frames are kept)"
STOPPED = "then run the same command again (finished frames are kept)"
MORE_SPACE = f"free some disk space, {STOPPED}"


@functools.lru_cache(maxsize=None)
def area_weights(n, size):
    """How much of each input pixel lies under each output pixel when n pixels become size: [q, p] f32, with p / q = n / size.

    200 -> 64 repeats itself every 25 -> 8 pixels, and one such block is all of the matrix that is not zero: 8 times less work.
    The weights are whole numbers, an input pixel being q wide and an output pixel p, so nothing is rounded before the end."""
    p, q = n // math.gcd(n, size), size // math.gcd(n, size)
    left_in, left_out = np.arange(p) * q, np.arange(q)[:, None] * p
    overlap = np.minimum(left_in + q, left_out + p) - np.maximum(left_in, left_out)      # [q, p]
    return np.maximum(overlap, 0).astype(np.float32)


def area_resize(image, size):
    """Average the exact area under each output pixel, fractions of pixels included, as OpenCV's INTER_AREA does when it shrinks.

    image: [H, W, 3] u8 -> [size, size, 3] u8, rounded.  A policy must see the simulator through this same function."""
    h, w, c = image.shape
    if h == w == size:
        return image
    rows, columns = area_weights(h, size), area_weights(w, size)
    x = rows @ image.reshape(-1, rows.shape[1], w * c).astype(np.float32)                # [H / p, q, W * 3]
    x = x.reshape(size, w, c).transpose(1, 0, 2).reshape(-1, columns.shape[1], size * c)  # [W / p, p, size * 3]
    x = (columns @ x).reshape(size, size, c).transpose(1, 0, 2)                          # [size, size, 3]
    return np.rint(x / (rows.shape[1] * columns.shape[1])).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def npy_header(header):
    """(dtype, shape, order) in an .npy header.  All frames share a few of them, and parsing them is a third of np.load's time."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return dtype, shape, "F" if fortran else "C"


def read_frame(source, number):
    """The FIELDS of one CALVIN frame as stored (depth and tactile images stay unread), checked for shape and type."""
    path, frame = Path(source) / f"episode_{number:07d}.npz", {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in FIELDS:
                raw = archive.read(key + ".npy")                                         # this checks the CRC, too
                start = 10 + int.from_bytes(raw[8:10], "little")
                dtype, shape, order = npy_header(raw[:start])
                frame[key] = np.frombuffer(raw, dtype, offset=start).reshape(shape, order=order)
    except KeyError as error:
        raise InputError(f"{path} lacks the key {key}: {AGAIN}") from error
    except Exception as error:                                      # zipfile, zlib and numpy have a dozen ways to say "damaged"
        raise InputError(f"{path} cannot be read ({str(error) or type(error).__name__}): {AGAIN}") from error
    for key, (shape, dtype) in FIELDS.items():
        value, image = frame[key], dtype is np.uint8                # the docs say float32, the official writer leaves float64
        fits = value.size and value.shape == value.shape[:1] * 2 + (3,) if image else value.shape == shape
        if not fits or value.dtype not in ((np.uint8,) if image else (np.float32, np.float64)):
            want = "a square uint8 image of 3 colours" if image else f"float32 or float64 {shape}"
            raise InputError(f"{path} holds {key} as {value.dtype} {value.shape} where {want} is expected: {AGAIN}")
    return frame


def import_chunk(source, folder, numbers, first, size):
    """Convert the CALVIN frames `numbers` [n] into positions first..first+n-1 of the arrays in folder -> how many actions were mended.

    Writes through plain files: a memory map would count as this process's memory, and would crash it on a full disk."""
    chunk = {key: np.empty((len(numbers), *shape), dtype) for key, (shape, dtype) in sized_fields(size).items()}
    with np.errstate(over="ignore"):                                # a float64 too big for float32 becomes inf, found below
        for i, number in enumerate(numbers):
            for key, value in read_frame(source, number).items():
                chunk[key][i] = area_resize(value, size) if value.ndim == 3 else value
    for key in ("robot_obs", "scene_obs", "rel_actions"):
        bad = numbers[~np.isfinite(chunk[key]).all(1)]
        if len(bad):
            raise InputError(f"{Path(source) / f'episode_{bad[0]:07d}.npz'} has a NaN or infinity in {key}: {AGAIN}")
    given = chunk["rel_actions"]                                    # by CALVIN's definition clipped, and the gripper -1 or +1;
    chunk["rel_actions"] = np.clip(given, -1, 1)                    # its early recordings hold a 0 for -1
    chunk["rel_actions"][:, 6] = np.where(given[:, 6] > 0, 1, -1)
    try:
        for key, values in chunk.items():
            with open(Path(folder) / f"{key}.npy", "r+b") as file:
                file.seek(NPY_START + first * values[0].nbytes)
                file.write(values)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; {MORE_SPACE}") from error
    return int((np.abs(given - chunk["rel_actions"]) > 1e-5).any(1).sum())


def sized_fields(size):
    """FIELDS with the image size filled in: {name: (shape of one frame, dtype)}."""
    return {key: (tuple(size if d == "S" else d for d in shape), dtype) for key, (shape, dtype) in FIELDS.items()}


def calm_worker():
    """Set up a worker process: Ctrl-C is its parent's business, and when the parent is killed it must not live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_jobs(jobs, workers):
    """Yield (first, result of import_chunk) as the jobs {first: arguments} finish, on `workers` processes."""
    if workers == 1:
        yield from ((first, import_chunk(*job)) for first, job in jobs.items())
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")                            # the workers inherit it: one core each
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), calm_worker)
    try:
        futures = {pool.submit(import_chunk, *job): first for first, job in jobs.items()}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise InputError(f"a worker process was killed, perhaps for lack of memory: use fewer --workers, {STOPPED}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_index(source):
    """Episodes [E, 2] of a CALVIN split (inclusive, ascending) and all their frame numbers [N], once every frame's file is seen to exist."""
    path, retry = source / "ep_start_end_ids.npy", "download it again from the official source"
    if not source.is_dir():
        raise InputError(f"there is no folder {source}: give the training or validation folder of CALVIN, such as task_D_D/training")
    if not path.exists():
        split = next((s for s in ("training", "validation") if (source / s / path.name).exists()), None)
        raise InputError(f"{path} is missing: {f'import one split at a time, here {source / split}' if split else retry}")
    try:
        ids = np.load(path)
        if not (ids.ndim == 2 and ids.shape[1] == 2 and len(ids) and ids.dtype.kind in "iu"):
            raise ValueError(f"it holds {ids.dtype} {ids.shape}, not whole numbers [episodes, 2]")
    except Exception as error:
        raise InputError(f"{path} cannot be used ({error}): {retry}") from error
    ids = ids[np.argsort(ids[:, 0])].astype(np.int64)
    if (ids[:, 1] < ids[:, 0]).any():
        raise InputError(f"{path} has an episode reversed, {ids[ids[:, 1] < ids[:, 0]][0].tolist()} ends before it starts: {retry}")
    if (ids[1:, 0] <= ids[:-1, 1]).any():
        raise InputError(f"{path} has episodes that overlap, at frame {ids[1:, 0][ids[1:, 0] <= ids[:-1, 1]][0]}: {retry}")
    names = (entry.name for entry in os.scandir(source))            # other .npz files may lie there: only this pattern counts
    have = np.sort([int(n[8:-4]) for n in names if n.startswith("episode_") and n.endswith(".npz") and n[8:-4].isdecimal()])
    if len(have) == 0 or ids[0, 0] < have[0] or ids[-1, 1] > have[-1]:
        span = f"are numbered {have[0]} to {have[-1]}" if len(have) else "(episode_0000000.npz, ...) are absent"
        raise InputError(f"{path} has frames out of range, {ids[0, 0]} to {ids[-1, 1]}, while the frame files beside it {span}: "
                         f"unpack the whole archive again")
    numbers = np.concatenate([np.arange(a, b + 1) for a, b in ids])
    missing = numbers[~np.isin(numbers, have)]
    if len(missing):
        raise InputError(f"{source / f'episode_{missing[0]:07d}.npz'} is missing ({len(missing)} of {len(numbers)} frame files are): "
                         f"unpack the whole archive again")
    return ids, numbers


class PlainUnpickler(pickle.Unpickler):
    """A pickle is a program.  This one may build numpy arrays, numbers, strings, lists and dicts, and can call nothing else."""
    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):    # its name before and since numpy 2: files hold either
        ALLOWED[core, "_reconstruct"] = np.empty(0).__reduce__()[0]
        ALLOWED[core, "scalar"] = np.float32(0).__reduce__()[0]

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which no annotation needs and which was not run")
        return self.ALLOWED[module, name]


def read_language(source, episodes):
    """Segments [[task, first, last], ...] of the language annotations in PACKED frame numbers, and how many had to be left out."""
    path = source / "lang_annotations" / "auto_lang_ann.npy"
    if not path.exists():
        print(f"warning: {path} is missing, so the dataset will have no task segments (enough for a world model, not for a policy)")
        return [], 0
    try:
        with open(path, "rb") as file:
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)](file)
            if header[2] != object:
                raise ValueError(f"it holds {header[2]} {header[0]}, not a dictionary")
            content = PlainUnpickler(file).load().item()
        tasks, pairs = list(content["language"]["task"]), np.array(list(content["info"]["indx"]) or np.zeros((0, 2), int))
        if pairs.shape != (len(tasks), 2) or pairs.dtype.kind not in "iu" or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"language.task, {len(tasks)} long, is not one name for each frame pair of info.indx, {pairs.dtype} {pairs.shape}")
    except Exception as error:                                      # a damaged pickle can raise nearly anything
        raise InputError(f"{path} is refused ({type(error).__name__}: {error}): download it again from the official source, "
                         f"or move it away to import without task segments") from error
    first, last = pairs.astype(np.int64).T
    episode = np.searchsorted(episodes[:, 0], first, "right") - 1   # the one that contains the segment, if any does
    inside = (episode >= 0) & (first <= last) & (last <= episodes[episode, 1])
    lengths = episodes[:, 1] - episodes[:, 0] + 1
    shift = (np.cumsum(lengths) - lengths - episodes[:, 0])[episode]                     # packed number - CALVIN's number
    segments = [[str(tasks[i]), int(first[i] + shift[i]), int(last[i] + shift[i])] for i in np.flatnonzero(inside)]
    return segments, len(tasks) - len(segments)


def announce(source, out, temporary, numbers, size, workers):
    """Say what the import will cost in disk and time before it starts, and refuse when the disk is too small."""
    need = len(numbers) * frame_bytes(size)
    kept = sum(f.stat().st_blocks * 512 for f in temporary.glob("*.npy")) if os.name == "posix" else 0      # when resuming
    free = kept + free_space(out.absolute().parent)
    started, probe = time.perf_counter(), numbers[:16]
    for number in probe:
        [area_resize(value, size) for value in read_frame(source, number).values() if value.ndim == 3]
    seconds = (time.perf_counter() - started) / len(probe) * len(numbers) / workers
    print(f"{source}: {len(numbers)} frames, {need / 1e9:.3f} GB at {size} px ({free / 1e9:.1f} GB are free), "
          f"about {seconds / 60:.1f} minutes with {workers} workers", flush=True)
    if free < need + 1e6:
        raise InputError(f"{out} needs {need / 1e9:.3f} GB of disk space and {free / 1e9:.3f} GB are free: free some, or choose --out on another disk")


def begin(temporary, key, frames, size):
    """The state of the import in `temporary`: the one found there if it belongs to the same import (key), else a fresh one."""
    try:
        state = json.loads((temporary / "progress.json").read_text())
        if state["key"] == key and all((temporary / f"{name}.npy").exists() for name in FIELDS):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                        # nothing there, or nothing usable
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, (shape, dtype) in sized_fields(size).items():
            with open(temporary / f"{name}.npy", "wb") as file:
                start = npy_start(file, (frames, *shape), dtype)
                file.truncate(start + frames * math.prod(shape) * np.dtype(dtype).itemsize)
            if start != NPY_START:
                raise RuntimeError(f"this NumPy ({np.__version__}) writes a header of {start} bytes, not {NPY_START}")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {temporary}: {error.strerror or error}; choose an --out folder with space where you may write") from error
    return {"key": key, "done": [], "mended": 0}


def convert(source, temporary, numbers, size, workers, state):
    """Run the chunks that state does not list as done, print frames/s and the time left, and keep state and its file up to date."""
    done = set(state["done"])
    jobs = {i: (str(source), str(temporary), numbers[i:i + CHUNK], i, size) for i in range(0, len(numbers), CHUNK) if i not in done}
    todo, count, terminal = sum(len(job[2]) for job in jobs.values()), 0, sys.stdout.isatty()
    start = shown = time.perf_counter()
    for first, mended in run_jobs(jobs, workers):
        state["done"].append(first)
        state["mended"] += mended
        write_atomic(temporary / "progress.json", lambda path: path.write_text(json.dumps(state)), MORE_SPACE)
        count, now = count + len(jobs[first][2]), time.perf_counter()
        if count in (len(jobs[first][2]), todo) or now - shown >= (0.5 if terminal else 10):
            rate, shown = count / (now - start), now
            print(f"{len(numbers) - todo + count}/{len(numbers)} frames, {rate:.0f} frames/s, {(todo - count) / rate / 60:.1f} minutes left",
                  end="  \r" if terminal and count < todo else "\n", flush=True)


def import_calvin(source, out, image_size=64, workers=2):
    """Turn a CALVIN split (its training or validation folder) into a packed dataset in the folder out, resuming what was cut off."""
    source, out = Path(source), Path(out)
    if not 8 <= image_size <= 512 or not 1 <= workers <= 256:
        raise InputError(f"--image-size {image_size} --workers {workers} is out of range: use 8 to 512 pixels and 1 to 256 workers")
    episodes, numbers = read_index(source)
    segments, left_out = read_language(source, episodes)
    if left_out:
        print(f"{left_out} of {left_out + len(segments)} language annotations are left out: their frames are not all in one recorded episode")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already: look at it with 'python data.py inspect {out}', then delete it or choose another --out")
    temporary = Path(f"{out.absolute()}.tmp")
    announce(source, out, temporary, numbers, image_size, workers)
    state = begin(temporary, [str(source.resolve()), episodes.tolist(), image_size, CHUNK], len(numbers), image_size)
    if state["done"]:
        print(f"going on with {temporary}, where {len(state['done'])} of {-(-len(numbers) // CHUNK)} chunks are finished")
    try:
        convert(source, temporary, numbers, image_size, workers, state)
        lengths = episodes[:, 1] - episodes[:, 0] + 1
        ids = np.stack([np.cumsum(lengths) - lengths, np.cumsum(lengths) - 1], 1)        # [E, 2]
        meta = dict(source="calvin", renderer="calvin dataset", split="/".join(source.resolve().parts[-2:]), segments_left_out=left_out,
                    actions_mended=state["mended"], frames=len(numbers), image_size=image_size, segments=segments,
                    numpy=np.__version__, written=time.strftime("%Y-%m-%d"))
        write_atomic(temporary / "ep_start_end_ids.npy", lambda path: np.save(path, ids), MORE_SPACE)
        write_atomic(temporary / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)), MORE_SPACE)
        Dataset(temporary)                                          # the checks that every reader makes
    except BaseException:
        if not state["done"]:                                       # nothing that would be worth resuming
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with writing(out, MORE_SPACE):
        (temporary / "progress.json").unlink()
        if out.is_dir():
            out.rmdir()                                             # empty, as seen above; Windows cannot rename onto it
        os.replace(temporary, out)
    if state["mended"]:
        print(f"{state['mended']} actions were mended to CALVIN's definition: motion clipped to -1..1, gripper 0 made -1")
    print(f"{len(numbers)} frames, {len(episodes)} episodes, {len(segments)} segments in {out}; look at them: python data.py inspect {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Looking

NAMES = {
    "rel_actions": "dx dy dz droll dpitch dyaw gripper",
    "robot_obs": "x y z roll pitch yaw width joint1 joint2 joint3 joint4 joint5 joint6 joint7 command",
    "scene_obs": " ".join(["slider drawer button switch bulb led"] + [f"{c}.x {c}.y {c}.z {c}.roll {c}.pitch {c}.yaw" for c in ("red", "blue", "pink")]),
}


def inspect(path, out=None):
    """Print what a dataset holds (lengths in frames, positions in m, angles in rad) and draw it into the file out, contact_sheet.png."""
    ds = Dataset(path)
    lengths = ds.episodes[:, 1] - ds.episodes[:, 0] + 1
    print(f"{path}: {len(ds)} frames ({len(ds) / 1800:.1f} minutes at 30 Hz), images {ds.image_size} px, "
          f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} frames")
    print(", ".join(f"{key}: {value}" for key, value in ds.meta.items() if key != "segments"))
    for task in sorted({task for task, _, _ in ds.segments}):
        spans = [b - a + 1 for t, a, b in ds.segments if t == task]
        print(f"  {task:32s} {len(spans):5d} segments of {min(spans)} to {max(spans)} frames")
    for key, names in NAMES.items():
        if key == "scene_obs" and not ds.has_scene:
            print("  no scene state: success is what the segments' ends show, and no task rule can check it")
            continue
        for name, low, high in zip(names.split(), ds[key].min(0), ds[key].max(0)):
            print(f"  {key + ' ' + name:32s} {low:9.4f} to {high:9.4f}")
    out = Path(out or ds.path / "contact_sheet.png")
    contact_sheet(ds, out)
    print(f"wrote {out}")


def contact_sheet(ds, out, columns=8, rows=40):
    """A picture of each task's first segment from start to end, static camera over gripper camera; of episodes if there are no segments."""
    from matplotlib.figure import Figure                            # here, as nothing else needs it; works without a display
    spans = list({task: (task, a, b) for task, a, b in reversed(ds.segments)}.values())
    spans = sorted(spans or [(f"episode {i}", a, b) for i, (a, b) in enumerate(ds.episodes)], key=lambda span: span[1])[:rows]
    figure = Figure(figsize=(1.2 * columns, 2.7 * len(spans)), layout="constrained")
    for axis, (title, a, b) in zip(np.atleast_1d(figure.subplots(len(spans), 1)), spans):
        frames = np.linspace(a, b, columns).round().astype(int)
        axis.imshow(np.concatenate([np.concatenate(list(ds[key][frames]), 1) for key in ("rgb_static", "rgb_gripper")]))    # [2 S, columns * S, 3]
        axis.set_title(f"{title}, frames {a} to {b}", fontsize=9)
        axis.axis("off")
    write_atomic(out, lambda path: figure.savefig(path, dpi=100, format="png"), "give another place for the picture: --out sheet.png")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def read_arguments(argv):
    """The parsed command line; whatever is wrong with it is one sentence, and an unknown flag is answered with the nearest known one."""
    def refuse(message):
        raise InputError(f"{message} (see 'python data.py --help')")

    parser = argparse.ArgumentParser(prog="data.py", description="Import CALVIN and inspect datasets.", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("command", choices=["import", "inspect"], help="convert a CALVIN split into a dataset, or print and draw what a dataset holds")
    parser.add_argument("folder", help="import: the folder with ep_start_end_ids.npy, such as task_D_D/training; inspect: a dataset")
    parser.add_argument("--out", help="import: folder of the new dataset; inspect: file of the picture (default: in the dataset)")
    parser.add_argument("--image-size", type=int, default=64, help="import: pixels along a side (default 64, the paper's)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="import: processes (default: one a core, at most 8)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], ["--out", "--image-size", "--workers", "--help"], 1, 0)
        refuse(f"{unknown[0]} is not understood, did you mean {near[0]}?")
    if arguments.command == "import" and not arguments.out:
        refuse("import needs the folder of the new dataset, such as --out data/calvin_d")
    return arguments


def main(argv=None):
    """Run one command -> the exit code: 0, 2 when something given cannot be used, 130 when interrupted."""
    try:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.command == "import":
            import_calvin(arguments.folder, arguments.out, arguments.image_size, arguments.workers)
        else:
            inspect(arguments.folder, arguments.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
