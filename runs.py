"""runs.py: what every stage needs and no paper mentions.  Settings, run folders, resuming, progress, processes.

A run folder runs/<name>/ holds one result a stage.  Each result carries the settings that it depends on (its stamp): a stage skips itself
when its result is there with today's settings, and a stage that reads a result of other settings refuses it and names the difference.
"""
import argparse
import csv
import dataclasses
import difflib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

import calvin_real
import calvin_sim
from data import FIELDS, Dataset, InputError, pack, save_part, write_atomic

STAGES = {  # name: (prefix of its own settings, stages it reads, is there one a task?)
    "play": ("play_", (), False),
    "demos": ("demo_", (), True),
    "wm": ("wm_", ("play",), False),
    "bc": ("bc_", ("wm", "demos"), True),
    "reward": ("reward_", ("wm", "demos"), True),
    "finetune": ("ft_", ("bc", "reward"), True),
    "eval": ("eval_", ("finetune",), True),
}
SAVE_EVERY = 30                                             # seconds between partial checkpoints
COMMON = ("seed", "sim", "image_size")                      # every stage depends on these; with --data only eval on the simulator


# --- settings -----------------------------------------------------------------------------------------------------------

def parse(argv, config, presets, description, epilog):
    """Flags over the run's config.json over the preset over the defaults -> an instance of the dataclass `config`.

    The comments behind the fields are the help texts: one place to read and to change them."""
    fields = dataclasses.fields(config)
    helps = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config), re.M))
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False)
    for field in fields:
        parser.add_argument(f"--{field.name}", type=field.type, default=argparse.SUPPRESS, metavar=field.type.__name__.upper(),
                            help=f"{helps[field.name]} [{field.default}]".replace("%", "%%"))

    def refuse(message):
        word = next((w for w in message.split() if w.startswith("--")), "").split("=")[0].rstrip(":")
        near = difflib.get_close_matches(word, [f"--{f.name}" for f in fields], 1) if "unrecognized" in message else []
        raise InputError(f"{message}; {f'did you mean {near[0]}?' if near else 'see --help'}")
    parser.error = refuse
    argv = [flag[:2] + flag[2:].partition("=")[0].replace("-", "_") + "".join(flag.partition("=")[1:]) if flag.startswith("--") else flag
            for flag in (sys.argv[1:] if argv is None else argv)]        # --calvin-root is --calvin_root
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "gpu" if torch.cuda.is_available() and given.get("device") != "cpu" else "cpu"
    known(preset, presets, "preset")
    saved = Path(given.get("runs", "runs")) / given.get("run", preset) / "config.json"
    settings = dict(presets[preset])
    if "preset" not in given and saved.exists():            # a run remembers its settings; flags still win
        kept = {f.name for f in fields} - {"stage", "task", "run", "runs", "device", "workers"}        # data and calvin_root are remembered
        settings = {k: v for k, v in load_file(saved)["settings"].items() if k in kept}
        preset = settings["preset"]
    return config(**{**settings, "run": preset, **given, "preset": preset})


def known(value, allowed, name):
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), 1)
        raise InputError(f"--{name} {value} is unknown{f' (did you mean {near[0]}?)' if near else ''}: choose {', '.join(allowed)}")


RENDERERS = {"tabletop": "PyBullet TinyRenderer (CPU)", "calvin": calvin_real.RENDERER, "none": "none"}


def versions(cfg):
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True) if shutil.which("git") else None
    return dict(torch=torch.__version__, numpy=np.__version__, python=platform.python_version(), device=cfg.device, sim=cfg.sim,
                renderer=RENDERERS[cfg.sim], commit=git.stdout.strip() if git and git.returncode == 0 else "unknown")


# --- results and their stamps -------------------------------------------------------------------------------------------

def output(cfg, stage):
    """Path of a stage's result: a dataset folder, a checkpoint or a JSON file."""
    name = f"{stage}_{cfg.task}" if STAGES[stage][2] else stage
    return Path(cfg.runs) / cfg.run / (name if stage in ("play", "demos") else f"{name}.json" if stage == "eval" else f"{name}.pt")


def stamp(cfg, stage):
    """All settings that the result of a stage depends on, those of the stages it reads included."""
    prefix, inputs, per_task = STAGES[stage]
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name.startswith(prefix) or f.name in COMMON or per_task and f.name == "task"}
    if cfg.data:
        settings["data"] = str(Path(cfg.data).resolve())
        if stage != "eval":
            del settings["sim"]
    for other in inputs:
        settings.update(stamp(cfg, other))
    return settings


def stamp_of(cfg, stage):
    """The stamp of an existing result, or None where there is none."""
    path = output(cfg, stage)
    if stage in ("play", "demos"):
        return load_file(path / "meta.json").get("stamp") if (path / "meta.json").exists() else None
    return load_file(path)["stamp"] if path.exists() else None


def load(cfg, stage):
    """The result of an earlier stage, if it was made with today's settings; anything else is an error that names the difference."""
    path, want, found = output(cfg, stage), stamp(cfg, stage), stamp_of(cfg, stage)
    if found is None:
        raise InputError(f"{path} is missing: run --stage {stage} first, or --stage all")
    for name in want:
        if found.get(name) != want[name]:
            owner = next((s for s, (prefix, _, _) in STAGES.items() if name.startswith(prefix)), stage)
            raise InputError(f"{path} was made with {name}={found.get(name)}, but the settings now say {name}={want[name]}: "
                             f"run --stage {owner} again (or --stage all), or give --{name} {found.get(name)}")
    return Dataset(path) if stage in ("play", "demos") else load_file(path, cfg.device)


def save(path, content):
    def write(temporary):
        try:
            torch.save(content, temporary)
        except RuntimeError as error:                       # torch reports a full disk as a RuntimeError
            raise OSError(str(error).splitlines()[0]) from error
    write_atomic(path, write)


def load_file(path, device="cpu"):
    """A checkpoint (tensors and plain containers only) or a JSON file."""
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is damaged or was not written by this program ({type(error).__name__}): delete it and run the same command again") from error


# --- a loop that can be killed --------------------------------------------------------------------------------------------

def seed_everything(*words):
    """Seed torch from the words and return a numpy generator seeded alike."""
    number = zlib.crc32(repr(words).encode())
    torch.manual_seed(number)
    return np.random.default_rng(number)


def partial_path(cfg, stage):
    path = output(cfg, stage)
    return path.with_name(path.stem + ".partial.pt")


def restore(cfg, stage, state):
    """Put what a killed run had saved back into state, as train() takes it.  -> the number of updates that it had done, 0 if there is nothing"""
    partial = partial_path(cfg, stage)
    content = load_file(partial, cfg.device) if partial.exists() else dict(stamp=None)
    if content["stamp"] != stamp(cfg, stage):
        return 0
    for name, thing in state.items():
        thing.load_state_dict(content["state"][name])
    return content["done"]


def cosine_lr(optimizer, peak, step, total, warmup=100, floor=0.1):
    """Linear warm-up, then half a cosine from peak to floor * peak."""
    rise, fall = min(1.0, (step + 1) / warmup), floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * fall


def train(cfg, stage, total, state, update, every=20):
    """Run update(i, rng) for i = 0..total-1; it returns a dict of 0-d tensors.  -> path of the partial checkpoint, to be deleted

    state: {name: object with state_dict}, saved every SAVE_EVERY seconds and restored when the program was killed.  Update i draws its random numbers from
    (seed, stage, task, i), so a resumed run ends as if nothing had happened.  Losses stay on the device and are looked at every `every` updates."""
    partial, key = partial_path(cfg, stage), (cfg.seed, stage, cfg.task if STAGES[stage][2] else "")
    saved, pending = time.time(), []
    if done := restore(cfg, stage, state):
        print(f"  {stage} resumes at {done:,} of {total:,}")
    log, progress = Log(cfg, stage, done), Progress(stage, total, done)
    for i in range(done, total):
        pending.append(update(i, seed_everything(*key, i)))
        if (i + 1) % every and i + 1 < total:
            continue
        metrics = {name: torch.stack([p[name].detach().float() for p in pending]).mean().item() for name in pending[-1]}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InputError(f"stage {stage}: the term '{name}' became {value} between steps {i + 2 - len(pending)} and {i + 1}; {partial} holds the "
                                 f"last good state, if one was saved: try a smaller learning rate (--{STAGES[stage][0]}...lr, see --help) and run again")
        pending = []
        log(i + 1, metrics)
        progress(i + 1, "  ".join(f"{n} {v:.4g}" for n, v in metrics.items()))
        if time.time() - saved > SAVE_EVERY and i + 1 < total:
            save(partial, dict(stamp=stamp(cfg, stage), done=i + 1, state={n: t.state_dict() for n, t in state.items()}))
            saved = time.time()
    return partial


class Snapshots(dict):
    """{iteration: weights, or a number}, saved and resumed with the rest of a training state."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, content):
        self.update(content)


class Progress:
    """One line with the time left: rewritten on a terminal, printed every 15 seconds into a log file."""

    def __init__(self, name, total, done=0):
        self.name, self.total, self.first, self.start, self.shown = name, total, done, time.time(), 0.0

    def __call__(self, done, text=""):
        tty, now = sys.stdout.isatty(), time.time()
        if now - self.shown < (0.5 if tty else 15) and done < self.total:
            return
        self.shown, rate = now, max(done - self.first, 1e-9) / (now - self.start + 1e-9)
        left = int((self.total - done) / rate)
        line = f"  {self.name:<14} {done:>7,}/{self.total:,}  {rate:8.1f}/s  {left // 60:3d}:{left % 60:02d} left  {text}"
        if tty:
            line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="\n" if not tty or done >= self.total else "", flush=True)


class Log:
    """runs/<name>/log.csv, long format: stage, task, step, metric, value.  Rows of a stage that is done again are replaced."""

    def __init__(self, cfg, stage, first=sys.maxsize):
        self.path, self.key = Path(cfg.runs) / cfg.run / "log.csv", [stage, cfg.task if STAGES[stage][2] else ""]
        rows = list(csv.reader(self.path.open())) if self.path.exists() else []
        keep = [r for r in rows if len(r) == 5 and r[0] != "stage" and (r[:2] != self.key or int(r[2]) <= first)]
        text = "\n".join(",".join(r) for r in [["stage", "task", "step", "metric", "value"]] + keep) + "\n"
        write_atomic(self.path, lambda p: p.write_text(text))

    def __call__(self, step, metrics):
        with self.path.open("a") as f:
            f.writelines(",".join([*self.key, str(step), name, f"{value:.6g}"]) + "\n" for name, value in metrics.items())


def run_stage(cfg, stage, work):
    """Do a stage, work(cfg), unless its output is there for the same settings; what it reads is checked first."""
    began, path = time.time(), output(cfg, stage)
    if stamp_of(cfg, stage) == stamp(cfg, stage):
        print(f"{stage}: {path} is there for the same settings, skipped")
        return
    for other in STAGES[stage][1]:
        load(cfg, other)
    print(f"{stage}: writes {path}")
    work(cfg)
    minutes = (time.time() - began) / 60
    Log(cfg, stage)(0, dict(minutes=minutes))
    print(f"{stage}: done in {minutes:.1f} min", flush=True)


def read_log(cfg, stage, metric):
    """(steps, values) of one metric of a stage."""
    path, key = Path(cfg.runs) / cfg.run / "log.csv", [stage, cfg.task if STAGES[stage][2] else ""]
    rows = [r for r in csv.reader(path.open()) if r[:2] == key and r[3] == metric] if path.exists() else []
    return [int(r[2]) for r in rows], [float(r[4]) for r in rows]


def in_processes(cfg, function, jobs, name):
    """Yield function(job) for all jobs, in their order, from cfg.workers processes, with a progress line."""
    progress = Progress(name, len(jobs))
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["torch", "pybullet"])   # once for all pools and processes: it takes seconds
    with context.Pool(min(cfg.workers, len(jobs)), _quiet) as pool:
        for i, result in enumerate(pool.imap(function, jobs)):
            progress(i + 1)
            yield result


def _quiet():
    """A worker is one thread, and leaves Ctrl-C to its parent."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def stop_if_orphaned():
    """A worker whose parent was killed must not go on writing files beside the run that resumes."""
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)


# --- recording ------------------------------------------------------------------------------------------------------------

def sim_of(cfg):
    return dict(sim=cfg.sim, image_size=cfg.image_size, calvin_root=cfg.calvin_root)


def make_sim(sim, image_size, calvin_root):
    return calvin_sim.Tabletop(image_size) if sim == "tabletop" else calvin_real.RealCalvin(image_size, root=calvin_root)


def record_job(job):
    """One simulator process records one episode to a file, unless it is there already."""
    stop_if_orphaned()
    path, kind, seed, length = Path(job["path"]), job["kind"], job["seed"], job["length"]
    if not path.exists():
        sim = record_job.__dict__.setdefault("sim", None) or make_sim(**job["sim"])                  # one simulator a process
        record_job.sim = sim
        if kind == "play":
            episode, solved = calvin_sim.play_episode(sim, seed, length), True
        else:
            episode, solved = calvin_sim.demo_episode(sim, kind, seed)
        save_part(path, dict(episode, solved=np.array(solved)))
    with np.load(path) as part:
        return bool(part["solved"]), len(part["rel_actions"])


def record(cfg, parts, wanted):
    """Record wanted = {kind: (first seed, number of episodes, their length)}; episodes that the expert fails are replaced by the next seed's.

    -> {kind: [(file, frames)]}, the same whatever the number of processes and however often it was interrupted"""
    parts.mkdir(parents=True, exist_ok=True)
    good, tried = {kind: [] for kind in wanted}, dict.fromkeys(wanted, 0)
    while any(len(good[kind]) < wanted[kind][1] for kind in wanted):
        jobs = []
        for kind, (first, count, length) in wanted.items():
            missing = count - len(good[kind])
            jobs += [dict(path=str(parts / f"{kind}_{first + tried[kind] + k}.npz"), kind=kind, seed=first + tried[kind] + k, length=length, sim=sim_of(cfg))
                     for k in range(missing)]
            tried[kind] += missing
            if tried[kind] > 3 * count + 20:
                raise InputError(f"the scripted expert solved only {len(good[kind])} of {tried[kind]} starts of {kind}: see 'python calvin_sim.py check'")
        for job, (solved, frames) in zip(jobs, in_processes(cfg, record_job, jobs, "episodes")):
            good[job["kind"]] += [(job["path"], frames)] if solved else []
    return good


def pack_recorded(cfg, stage, folder, good):
    meta = dict(source="calvin_env" if cfg.sim == "calvin" else "built-in tabletop", stamp=stamp(cfg, stage), seed=cfg.seed, renderer=versions(cfg)["renderer"], versions=versions(cfg))
    pack([path for kind in good for path, _ in good[kind]], folder, meta, [(kind, 0, n - 1) for kind in good if kind != "play" for _, n in good[kind]] or None)


# --- somebody else's recording: --data ------------------------------------------------------------------------------------

def check_config(cfg):
    """Settings that cannot work are refused now, not after hours; the device is chosen.  -> cfg"""
    for name, allowed in (("task", [*calvin_sim.TASKS, "all"]), ("stage", [*STAGES, "report", "all"]), ("sim", [*RENDERERS]), ("wm_encoder", ["linear", "conv"]), ("wm_latent", ["gaussian", "categorical"]),
                          ("bc_net", ["mlp", "unet"]), ("bc_actor", ["diffusion", "gaussian"]), ("reward_labels", ["unlabelled", "demos", "predicate"]), ("device", ["auto", "cpu", "cuda"])):
        known(getattr(cfg, name), allowed, name)
    if cfg.sim == "none" and not cfg.data:
        raise InputError("--sim none has nothing to record in: give a dataset with --data, or choose --sim tabletop")
    if cfg.sim == "calvin":
        calvin_real.import_calvin_env(cfg.calvin_root)      # now, not after hours of training
    if cfg.data:
        check_data(cfg)
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but this torch sees no CUDA device: use --device cpu")
    if cfg.device == "cuda":
        torch.set_float32_matmul_precision("high")          # TF32
    if cfg.wm_encoder == "conv" and cfg.image_size != 64:
        raise InputError(f"--wm_encoder conv is built for 64x64 frames, not --image_size {cfg.image_size}: use --wm_encoder linear")
    if not 1 <= cfg.ft_steps <= cfg.bc_steps:
        raise InputError(f"--ft_steps (K') must lie between 1 and --bc_steps (K = {cfg.bc_steps}), not {cfg.ft_steps}")
    if cfg.reward_rounds and cfg.reward_labels != "unlabelled":
        raise InputError(f"--reward_rounds {cfg.reward_rounds} lets unlabelled play change sides, but --reward_labels {cfg.reward_labels} has none: give --reward_rounds 0")
    if cfg.ft_iterations <= cfg.ft_warmup:
        raise InputError(f"--ft_iterations {cfg.ft_iterations} would train the critic only, for the actor waits for --ft_warmup {cfg.ft_warmup}: give more iterations or less warm-up")
    if cfg.wm_length < 2:
        raise InputError(f"--wm_length {cfg.wm_length} leaves nothing to foresee after the first frame: give 2 or more")
    if cfg.wm_stride < 1 or cfg.bc_chunk % cfg.wm_stride:
        raise InputError(f"--bc_chunk {cfg.bc_chunk} must be a multiple of --wm_stride {cfg.wm_stride}: a chunk is dreamed in whole steps of the world model")
    if cfg.bc_net == "unet" and cfg.bc_chunk % 4:
        raise InputError(f"--bc_net unet halves the chunk twice, so --bc_chunk must be a multiple of 4, not {cfg.bc_chunk}")
    return cfg


def check_data(cfg):
    """The dataset of --data, if a run with these settings can use it."""
    given = Dataset(cfg.data)
    if given.meta["image_size"] != cfg.image_size:
        raise InputError(f"{cfg.data} holds frames of {given.meta['image_size']} px, not {cfg.image_size}: give --image_size {given.meta['image_size']}, or import it again")
    if cfg.sim != "none" and given.meta.get("renderer") != RENDERERS[cfg.sim]:
        print(f"warning: {cfg.data} was rendered by '{given.meta.get('renderer')}' and --sim {cfg.sim} renders by '{RENDERERS[cfg.sim]}': "
              f"the policy will meet pictures that it was not trained on")
    return given


def cut_episodes(episodes, length):
    """Cut long episodes [E, 2] into even pieces of at most `length` frames: whole ones can be held out, even if the recording is a single one."""
    pieces = [np.array_split(np.arange(a, b + 1), -(-(b - a + 1) // length)) for a, b in episodes]
    return np.array([(p[0], p[-1]) for episode in pieces for p in episode], np.int64)


def use_given_play(cfg, folder):
    """The dataset of --data as play, by links, and what was held out of it as the demonstrations that judge the world model."""
    given, temporary = check_data(cfg), folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for key in FIELDS:
        os.symlink((given.path / f"{key}.npy").resolve(), temporary / f"{key}.npy")
    np.save(temporary / "ep_start_end_ids.npy", cut_episodes(given.episodes, cfg.play_episode))
    (temporary / "meta.json").write_text(json.dumps(dict(given.meta, stamp=stamp(cfg, "play")), indent=1))
    judges, (_, held_out) = [], Dataset(temporary).split(0.1)
    for task in calvin_sim.TASKS:
        every = [s for s in given.segments if s[0] == task]
        unseen = [s for s in every if any(a <= s[1] and s[2] <= b for a, b in held_out)]
        if every and not unseen:
            print(f"warning: no segment of {task} was held out of {cfg.data}: the world model is judged on ones that it was trained on")
        judges += (unseen or every)[:cfg.play_replay]
    pack_segments(cfg, "play", folder.with_name("replay"), judges)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def use_given_demos(cfg, folder):
    """Up to demo_count segments of the task in the dataset of --data, those that judge the world model last."""
    given, (_, held_out) = check_data(cfg), Dataset(output(cfg, "play")).split(0.1)
    segments = sorted((s for s in given.segments if s[0] == cfg.task), key=lambda s: any(a <= s[1] and s[2] <= b for a, b in held_out))[:cfg.demo_count]
    if not segments:
        raise InputError(f"{cfg.data} has no segments of {cfg.task} to clone: 'python data.py inspect {cfg.data}' lists those it has")
    print(f"  {len(segments)} demonstrations of {cfg.task} in {cfg.data}")
    pack_segments(cfg, "demos", folder, segments)


def pack_segments(cfg, stage, folder, segments):
    """Copy segments [(task, first, last)] of the dataset of --data into one of their own, an episode each."""
    given, parts = Dataset(cfg.data), folder.with_name(folder.name + ".parts")
    for i, (_, a, b) in enumerate(segments):
        save_part(parts / f"{i}.npz", {key: given[key][a:b + 1] for key in FIELDS})
    meta = {key: given.meta.get(key) for key in ("source", "renderer")}
    pack([parts / f"{i}.npz" for i in range(len(segments))], folder, dict(meta, stamp=stamp(cfg, stage), versions=versions(cfg)), [(task, 0, b - a) for task, a, b in segments])
    shutil.rmtree(parts)
