"""calvin_import.py: CALVIN's files -> a packed dataset, as data.py has it.

Its folder holds one compressed .npz a FRAME, 50 kB each: far too slow to train from.  Unpacking a frame costs
about 1 ms, once; everything below is built to add little to that.
"""
import concurrent.futures
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from data import FIELDS, Dataset, area_resize, frame_bytes, npy_start, sized_fields
from support.files import InputError, free_space, write_atomic, writing
from support.runs import calm_worker

CHUNK = 128        # frames a worker converts at a time: the unit of resuming, and 3 MB of its memory at 64 px
NPY_START = 128    # bytes of header that numpy gives the arrays made here
AGAIN = "download it again, then run the same command (finished frames are kept)"
STOPPED = "then run the same command again (finished frames are kept)"
MORE_SPACE = f"free some disk space, {STOPPED}"


@functools.lru_cache(maxsize=64)
def npy_header(header):
    """(dtype, shape, order) in an .npy header.

    All frames share a few of them, and parsing them is a third of np.load's time."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return dtype, shape, "F" if fortran else "C"


def read_frame(source, number):
    """The FIELDS of one CALVIN frame as stored, checked for shape and type.

    Depth and tactile images stay unread."""
    path = Path(source) / f"episode_{number:07d}.npz"
    frame = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in FIELDS:
                raw = archive.read(key + ".npy")    # this checks the CRC, too
                start = 10 + int.from_bytes(raw[8:10], "little")
                dtype, shape, order = npy_header(raw[:start])
                frame[key] = np.frombuffer(raw, dtype, offset=start).reshape(shape, order=order)
    except KeyError as error:
        raise InputError(f"{path} lacks the key {key}: {AGAIN}") from error
    except Exception as error:                    # zipfile, zlib and numpy have a dozen ways to say "damaged"
        raise InputError(f"{path} cannot be read ({str(error) or type(error).__name__}): {AGAIN}") from error
    for key, (shape, dtype) in FIELDS.items():
        value = frame[key]
        if dtype is np.uint8:
            fits = value.size and value.shape == value.shape[:1] * 2 + (3,)
            types = (np.uint8,)
            want = "a square uint8 image of 3 colours"
        else:                                       # the docs say float32, the official writer leaves float64
            fits = value.shape == shape
            types = (np.float32, np.float64)
            want = f"float32 or float64 {shape}"
        if not fits or value.dtype not in types:
            raise InputError(f"{path} holds {key} as {value.dtype} {value.shape} where {want} is expected: "
                             f"{AGAIN}")
    return frame


def import_chunk(source, folder, numbers, first, size):
    """Convert the CALVIN frames `numbers` [n] into positions first..first+n-1 of the arrays in folder.

    Writes through plain files: a memory map would count as this process's memory, and would crash it on a
    full disk.  -> how many actions were mended"""
    chunk = {}
    for key, (shape, dtype) in sized_fields(size).items():
        chunk[key] = np.empty((len(numbers), *shape), dtype)
    with np.errstate(over="ignore"):                # a float64 too big for float32 becomes inf, found below
        for i, number in enumerate(numbers):
            for key, value in read_frame(source, number).items():
                chunk[key][i] = area_resize(value, size) if value.ndim == 3 else value
    for key in ("robot_obs", "scene_obs", "rel_actions"):
        bad = numbers[~np.isfinite(chunk[key]).all(1)]
        if len(bad):
            path = Path(source) / f"episode_{bad[0]:07d}.npz"
            raise InputError(f"{path} has a NaN or infinity in {key}: {AGAIN}")
    # by CALVIN's definition clipped, and the gripper -1 or +1; its early recordings hold a 0 for -1
    given = chunk["rel_actions"]
    chunk["rel_actions"] = np.clip(given, -1, 1)
    chunk["rel_actions"][:, 6] = np.where(given[:, 6] > 0, 1, -1)
    try:
        for key, values in chunk.items():
            with open(Path(folder) / f"{key}.npy", "r+b") as file:
                file.seek(NPY_START + first * values[0].nbytes)
                file.write(values)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; {MORE_SPACE}") from error
    return int((np.abs(given - chunk["rel_actions"]) > 1e-5).any(1).sum())


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
        raise InputError("a worker process was killed, perhaps for lack of memory: "
                         f"use fewer --workers, {STOPPED}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_index(source):
    """Episodes [E, 2] of a CALVIN split (inclusive, ascending) and all their frame numbers [N].

    Every frame's file is seen to exist."""
    path = source / "ep_start_end_ids.npy"
    retry = "download it again from the official source"
    if not source.is_dir():
        raise InputError(f"there is no folder {source}: "
                         "give the training or validation folder of CALVIN, such as task_D_D/training")
    if not path.exists():
        for split in ("training", "validation"):
            if (source / split / path.name).exists():
                raise InputError(f"{path} is missing: import one split at a time, here {source / split}")
        raise InputError(f"{path} is missing: {retry}")
    try:
        ids = np.load(path)
        if not (ids.ndim == 2 and ids.shape[1] == 2 and len(ids) and ids.dtype.kind in "iu"):
            raise ValueError(f"it holds {ids.dtype} {ids.shape}, not whole numbers [episodes, 2]")
    except Exception as error:
        raise InputError(f"{path} cannot be used ({error}): {retry}") from error
    ids = ids[np.argsort(ids[:, 0])].astype(np.int64)
    turned = ids[ids[:, 1] < ids[:, 0]]
    if len(turned):
        raise InputError(f"{path} has an episode reversed, {turned[0].tolist()} ends before it starts: "
                         f"{retry}")
    overlapping = ids[1:, 0][ids[1:, 0] <= ids[:-1, 1]]
    if len(overlapping):
        raise InputError(f"{path} has episodes that overlap, at frame {overlapping[0]}: {retry}")
    have = []
    for entry in os.scandir(source):                # other .npz files may lie there: only this pattern counts
        digits = entry.name[8:-4]
        if entry.name.startswith("episode_") and entry.name.endswith(".npz") and digits.isdecimal():
            have.append(int(digits))
    have = np.sort(have)
    if len(have) == 0 or ids[0, 0] < have[0] or ids[-1, 1] > have[-1]:
        span = "(episode_0000000.npz, ...) are absent"
        if len(have):
            span = f"are numbered {have[0]} to {have[-1]}"
        raise InputError(f"{path} has frames out of range, {ids[0, 0]} to {ids[-1, 1]}, "
                         f"while the frame files beside it {span}: unpack the whole archive again")
    numbers = np.concatenate([np.arange(a, b + 1) for a, b in ids])
    missing = numbers[~np.isin(numbers, have)]
    if len(missing):
        path = source / f"episode_{missing[0]:07d}.npz"
        raise InputError(f"{path} is missing ({len(missing)} of {len(numbers)} frame files are): "
                         "unpack the whole archive again")
    return ids, numbers


class PlainUnpickler(pickle.Unpickler):
    """A pickle is a program.

    This one may build numpy arrays, numbers, strings, lists and dicts, and can call nothing else."""
    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    # its name before and since numpy 2: files hold either
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        ALLOWED[core, "_reconstruct"] = np.empty(0).__reduce__()[0]
        ALLOWED[core, "scalar"] = np.float32(0).__reduce__()[0]

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which no annotation needs "
                                         "and which was not run")
        return self.ALLOWED[module, name]


def read_language(source, episodes):
    """Segments [[task, first, last], ...] of the language annotations in PACKED frame numbers.

    And how many had to be left out."""
    path = source / "lang_annotations" / "auto_lang_ann.npy"
    if not path.exists():
        print(f"warning: {path} is missing, so the dataset will have no task segments "
              "(enough for a world model, not for a policy)")
        return [], 0
    try:
        with open(path, "rb") as file:
            npy = np.lib.format
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            shape, _, dtype = readers[npy.read_magic(file)](file)
            if dtype != object:
                raise ValueError(f"it holds {dtype} {shape}, not a dictionary")
            content = PlainUnpickler(file).load().item()
        tasks = list(content["language"]["task"])
        pairs = np.array(list(content["info"]["indx"]) or np.zeros((0, 2), int))
        whole = pairs.shape == (len(tasks), 2) and pairs.dtype.kind in "iu"
        if not whole or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"language.task, {len(tasks)} long, is not one name for each frame pair "
                             f"of info.indx, {pairs.dtype} {pairs.shape}")
    except Exception as error:                      # a damaged pickle can raise nearly anything
        raise InputError(f"{path} is refused ({type(error).__name__}: {error}): download it again from the "
                         "official source, or move it away to import without task segments") from error
    first, last = pairs.astype(np.int64).T
    # the one that contains the segment, if any does
    episode = np.searchsorted(episodes[:, 0], first, "right") - 1
    inside = (episode >= 0) & (first <= last) & (last <= episodes[episode, 1])
    lengths = episodes[:, 1] - episodes[:, 0] + 1
    shift = (np.cumsum(lengths) - lengths - episodes[:, 0])[episode]     # packed number - CALVIN's number
    segments = []
    for i in np.flatnonzero(inside):
        segments.append([str(tasks[i]), int(first[i] + shift[i]), int(last[i] + shift[i])])
    return segments, len(tasks) - len(segments)


def announce(source, out, temporary, numbers, size, workers):
    """Say what the import will cost in disk and time before it starts.

    And refuse when the disk is too small."""
    need = len(numbers) * frame_bytes(size)
    kept = 0                                        # when resuming
    if os.name == "posix":
        kept = sum(file.stat().st_blocks * 512 for file in temporary.glob("*.npy"))
    free = kept + free_space(out.absolute().parent)
    started = time.perf_counter()
    probe = numbers[:16]
    for number in probe:
        for value in read_frame(source, number).values():
            if value.ndim == 3:
                area_resize(value, size)
    seconds = (time.perf_counter() - started) / len(probe) * len(numbers) / workers
    print(f"{source}: {len(numbers)} frames, {need / 1e9:.3f} GB at {size} px ({free / 1e9:.1f} GB are "
          f"free), about {seconds / 60:.1f} minutes with {workers} workers", flush=True)
    if free < need + 1e6:
        raise InputError(f"{out} needs {need / 1e9:.3f} GB of disk space and {free / 1e9:.3f} GB are free: "
                         "free some, or choose --out on another disk")


def begin(temporary, key, frames, size):
    """The state of the import in `temporary`.

    The one found there if it belongs to the same import (key), else a fresh one."""
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
                raise RuntimeError(f"this NumPy ({np.__version__}) writes a header of {start} bytes, "
                                   f"not {NPY_START}")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {temporary}: {error.strerror or error}; "
                         "choose an --out folder with space where you may write") from error
    return {"key": key, "done": [], "mended": 0}


def convert(source, temporary, numbers, size, workers, state):
    """Run the chunks that state does not list as done, and keep state and its file up to date.

    Prints frames/s and the time left."""
    done = set(state["done"])
    jobs = {}
    for i in range(0, len(numbers), CHUNK):
        if i not in done:
            jobs[i] = (str(source), str(temporary), numbers[i:i + CHUNK], i, size)
    todo = sum(len(job[2]) for job in jobs.values())
    count = 0
    terminal = sys.stdout.isatty()
    start = shown = time.perf_counter()
    for first, mended in run_jobs(jobs, workers):
        state["done"].append(first)
        state["mended"] += mended
        write_atomic(temporary / "progress.json", lambda path: path.write_text(json.dumps(state)), MORE_SPACE)
        converted = len(jobs[first][2])
        count += converted
        now = time.perf_counter()
        if count in (converted, todo) or now - shown >= (0.5 if terminal else 10):
            rate = count / (now - start)
            shown = now
            print(f"{len(numbers) - todo + count}/{len(numbers)} frames, {rate:.0f} frames/s, "
                  f"{(todo - count) / rate / 60:.1f} minutes left",
                  end="  \r" if terminal and count < todo else "\n", flush=True)


def import_calvin(source, out, image_size=64, workers=2):
    """Turn a CALVIN split (its training or validation folder) into a packed dataset in the folder out.

    Resumes what was cut off."""
    source = Path(source)
    out = Path(out)
    if not 8 <= image_size <= 512 or not 1 <= workers <= 256:
        raise InputError(f"--image-size {image_size} --workers {workers} is out of range: "
                         "use 8 to 512 pixels and 1 to 256 workers")
    episodes, numbers = read_index(source)
    segments, left_out = read_language(source, episodes)
    if left_out:
        print(f"{left_out} of {left_out + len(segments)} language annotations are left out: "
              "their frames are not all in one recorded episode")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already: look at it with 'python data.py inspect {out}', "
                         "then delete it or choose another --out")
    temporary = Path(f"{out.absolute()}.tmp")
    announce(source, out, temporary, numbers, image_size, workers)
    key = [str(source.resolve()), episodes.tolist(), image_size, CHUNK]
    state = begin(temporary, key, len(numbers), image_size)
    if state["done"]:
        chunks = -(-len(numbers) // CHUNK)
        print(f"going on with {temporary}, where {len(state['done'])} of {chunks} chunks are finished")
    try:
        convert(source, temporary, numbers, image_size, workers, state)
        lengths = episodes[:, 1] - episodes[:, 0] + 1
        ends = np.cumsum(lengths)
        ids = np.stack([ends - lengths, ends - 1], 1)                    # [E, 2]
        meta = dict(
            source="calvin",
            renderer="calvin dataset",
            split="/".join(source.resolve().parts[-2:]),
            segments_left_out=left_out,
            actions_mended=state["mended"],
            frames=len(numbers),
            image_size=image_size,
            segments=segments,
            numpy=np.__version__,
            written=time.strftime("%Y-%m-%d"),
        )
        text = json.dumps(meta, indent=1)
        write_atomic(temporary / "ep_start_end_ids.npy", lambda path: np.save(path, ids), MORE_SPACE)
        write_atomic(temporary / "meta.json", lambda path: path.write_text(text), MORE_SPACE)
        Dataset(temporary)                          # the checks that every reader makes
    except BaseException:
        if not state["done"]:                                       # nothing that would be worth resuming
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with writing(out, MORE_SPACE):
        (temporary / "progress.json").unlink()
        if out.is_dir():
            out.rmdir()                             # empty, as seen above; Windows cannot rename onto it
        os.replace(temporary, out)
    if state["mended"]:
        print(f"{state['mended']} actions were mended to CALVIN's definition: "
              "motion clipped to -1..1, gripper 0 made -1")
    print(f"{len(numbers)} frames, {len(episodes)} episodes, {len(segments)} segments in {out}; "
          f"look at them: python data.py inspect {out}")
