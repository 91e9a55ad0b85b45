"""runs.py: what every stage needs and no paper mentions.

Settings, run folders, resuming, progress, processes.

A run folder runs/<name>/ holds one result a stage.  Each result remembers the settings that it depends on
(its stamp), the code that made it and the results that it was made from: a stage skips itself when its result
is there with today's settings and code, and a stage that reads a result of others refuses it and names the
difference.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout                      # comes with torch

import calvin_sim
from data import Dataset, Recording, frame_bytes
from support import calvin_real, parallel, report
from support.files import ELSEWHERE, InputError, write_atomic, writing
from support.fingerprint import code_of, definitions
from support.linear import FITTED_ON
from support.presets import BY_SIMULATOR, PRESETS

STAGES = {  # name: (prefix of its own settings, stages it reads, is there one a task?)
    "play": ("play_", (), False),
    "demos": ("demo_", (), True),
    "wm": ("wm_", ("play",), False),
    "bc": ("bc_", ("wm", "demos"), True),
    "reward": ("reward_", ("wm", "demos"), True),
    "finetune": ("ft_", ("bc", "reward"), True),
    "eval": ("eval_", ("finetune",), True),
    "online": ("online_", ("eval",), True),
}
PIPELINE = [stage for stage in STAGES if stage != "online"]  # what --stage all does, and then the report
SAVE_EVERY = 30                                             # seconds between partial checkpoints
# every stage depends on these (with --data only eval on sim)
COMMON = ("seed", "sim", "image_size")


# --- settings -----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class RunSettings:
    """What a run is called, where it lies and on what it runs; the method's settings are diwa.Config's."""
    # the run
    stage: str = "all"              # play, demos, wm, bc, reward, finetune, eval, report; online; or all
    preset: str = "cpu"             # cpu (on GPUs, too), gpu (convolutions), paper, class or smoke
    run: str = ""                   # name of the run folder; default: the preset's name
    runs: str = "runs"              # where run folders are kept
    device: str = "auto"            # cpu, cuda or auto
    workers: int = 2                # simulator processes
    policy: str = ""                # with --stage eval: bc, tuned, online or a snapshot, tried alone
    keep: str = ""                  # stages (comma-separated) to use although their code has changed
    sim: str = "tabletop"           # tabletop, calvin (needs --calvin_root) or none (needs --data)
    calvin_root: str = "calvin_env"  # folder of the cloned calvin_env
    data: str = ""                  # a recording (data.py): its frames are play, its segments demonstrations
    image_size: int = 64            # pixels a side of both cameras (paper: 64)


def parse(argv, config, presets, description, epilog):
    """Flags over the run's config.json over the preset over the defaults -> an instance of `config`.

    That is a dataclass.  The comments behind the fields are the help texts: one place to read and to change
    them."""
    fields = dataclasses.fields(config)
    usage = "python diwa.py [--setting value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=description, epilog=epilog, allow_abbrev=False)
    for title, names in groups_of(config).items():
        group = parser.add_argument_group(title)
        for name, text in names.items():
            field = config.__dataclass_fields__[name]
            usual = [str(field.default)]
            usual += [f"{sim}: {change[name]}" for sim, change in BY_SIMULATOR.items() if name in change]
            group.add_argument(
                f"--{name}",
                type=field.type,
                default=argparse.SUPPRESS,
                metavar=field.type.__name__.upper(),
                help=f"{text} [{'; '.join(usual)}]".replace("%", "%%"),
            )

    def refuse(message):
        word = next((w for w in message.split() if w.startswith("--")), "").split("=")[0].rstrip(":")
        near = []
        if "unrecognized" in message:
            near = difflib.get_close_matches(word, [f"--{f.name}" for f in fields], 1)
        raise InputError(f"{message}; {f'did you mean {near[0]}?' if near else 'see --help'}")

    parser.error = refuse
    argv = [underscored(flag) for flag in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", config.preset)
    known(preset, presets, "preset")
    if given.get("run") == "":
        raise InputError("--run '' names no folder: give it a name, or leave --run out")
    run = given.get("run", preset)
    saved = Path(given.get("runs", "runs")) / run / "config.json"
    settings = usual_settings(presets, preset, given.get("sim"))
    if "preset" not in given and exists(saved):             # a run remembers its settings; flags still win
        settings = saved_settings(saved, fields)
        preset = settings.get("preset", preset)
        known(preset, presets, "preset")
        sims = {settings.get("sim", config.sim), given.get("sim", "none")}
        if {"tabletop", "calvin"} <= sims:
            raise InputError(f"{saved.parent} is a run of the other simulator and has the settings of that "
                             f"one: give --run and a new name, or --preset {preset} to begin anew there")
    return config(**{**settings, **given, "run": run, "preset": preset})


def groups_of(config):
    """The settings in the order of the source -> {heading: {name: help text}}

    A comment line is a heading, the comment behind a field its help text; those of the run come second."""
    own, *inherited = [inspect.getsource(c) for c in config.__mro__ if dataclasses.is_dataclass(c)]
    found = {}
    for source in (own, *inherited):
        for heading, name, text in re.findall(r"^    (?:# (.*)|(\w+): .*?#\s*(.*))$", source, re.M):
            if heading:
                names = found.setdefault(heading, {})
            else:
                names[name] = text
    first, *rest = found
    return {heading: found[heading] for heading in (first, *sorted(rest, key=lambda h: h != "the run"))}


def underscored(flag):
    """--calvin-root is --calvin_root; what follows an equals sign stays as it is."""
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def hint(name, allowed):
    """The allowed name that was probably meant, as a remark in brackets; "" where none is near."""
    near = difflib.get_close_matches(str(name), list(allowed), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def exists(path):
    """Path.exists, but a name that the file system refuses is one sentence.

    Such a name has 300 letters, or lies in a forbidden folder."""
    with writing(path):
        return path.exists()


def saved_settings(path, fields):
    """The settings in a run's config.json, as far as a run remembers them.  -> {name: value}

    People edit that file, so it is checked."""
    content = load_file(path)
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise InputError(f'{path} has no "settings": correct it, '
                         "or delete it and give your settings as flags")
    types = {f.name: f.type for f in fields}
    settings = {name: value for name, value in settings.items() if name not in FORMER}
    for name, value in settings.items():
        if name not in types:
            raise InputError(f"{path} names {name}, which is no setting{hint(name, types)}: "
                             "correct or remove that line")
        fits = isinstance(value, types[name]) or types[name] is float and isinstance(value, int)
        if not fits or isinstance(value, bool):
            raise InputError(f"{path} says {name} = {json.dumps(value)}, which is no {types[name].__name__}: "
                             "correct that line")
    forgotten = ("stage", "task", "run", "runs", "device", "workers", "keep", "policy")
    return {name: types[name](value) for name, value in settings.items() if name not in forgotten}


def usual_settings(presets, preset, sim):
    """What a preset and a simulator set, where no flag does; the preset wins."""
    return {**BY_SIMULATOR.get(sim, {}), **presets[preset]}


def changed_settings(cfg):
    """In what a run differs from `--preset ... --sim ...` alone -> {name: value}

    Not counted: what it is called, where it runs, its task and seed, and how often it is tried."""
    usual = type(cfg)(**usual_settings(PRESETS, cfg.preset, cfg.sim))
    aside = {field.name for field in dataclasses.fields(RunSettings)} - {"data", "image_size"}
    aside |= {"task", "seed", "eval_episodes", "eval_curve", "eval_official", "online_steps"}
    names = [field.name for field in dataclasses.fields(cfg) if field.name not in aside]
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(usual, name)}


FORMER = ("reward_rounds",)         # settings of older versions, which a config.json may still name


def known(value, allowed, name):
    if value not in allowed:
        raise InputError(f"--{name} {value} is unknown{hint(value, allowed)}: choose {', '.join(allowed)}")


RENDERERS = {"tabletop": "PyBullet TinyRenderer (CPU)", "calvin": calvin_real.RENDERER, "none": "none"}


def versions(cfg):
    return dict(
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        device=cfg.device,
        sim=cfg.sim,
        renderer=RENDERERS[cfg.sim],
        commit=commit(Path(__file__)),
    )


def commit(file):
    """The commit that a file is of, "-dirty" if its repository has changes.

    It is "unknown" where the file lies in no repository, or in one of others."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True)

    if not shutil.which("git") or git("ls-files", "--error-unmatch", file.name).returncode:
        return "unknown"
    return git("describe", "--always", "--dirty", "--exclude=*").stdout.strip() or "unknown"


def remember(cfg):
    """Write config.json: from now on the run has these settings."""
    content = dict(settings=dataclasses.asdict(cfg), versions=versions(cfg))
    path = Path(cfg.runs) / cfg.run / "config.json"
    write_atomic(path, lambda p: p.write_text(json.dumps(content, indent=1)))


# --- results and their stamps -------------------------------------------------------------------------------

def output(cfg, stage):
    """Path of a stage's result: a dataset folder, a checkpoint or a JSON file."""
    name = f"{stage}_{cfg.task}" if STAGES[stage][2] else stage
    folder = Path(cfg.runs) / cfg.run
    if stage in ("play", "demos"):
        return folder / name
    return folder / (f"{name}.json" if stage == "eval" else f"{name}.pt")


def stamp(cfg, stage):
    """All settings that the result of a stage depends on, those of the stages it reads included."""
    prefix, inputs, per_task = STAGES[stage]
    names = [f.name for f in dataclasses.fields(cfg)]
    names = [n for n in names if n.startswith(prefix) or n in COMMON or per_task and n == "task"]
    settings = {name: getattr(cfg, name) for name in names}
    if cfg.data:
        settings["data"] = identity(str(Path(cfg.data).absolute()))
        if stage != "eval":
            del settings["sim"]
    for other in inputs:
        settings.update(stamp(cfg, other))
    return settings


@functools.lru_cache(maxsize=8)
def identity(folder):
    """A recording is known by what is in it, not by where it lies.

    What tells is a checksum of its numbers and of a few of its pictures."""
    dataset = Dataset(folder)
    some = np.linspace(0, len(dataset) - 1, 50).astype(int)
    numbers = [dataset[key] for key in ("robot_obs", "rel_actions", "scene_obs")]
    number = 0
    for array in (dataset.episodes, *numbers, dataset["rgb_static"][some]):
        number = zlib.crc32(np.ascontiguousarray(array), number)
    return f"{len(dataset)} frames, checksum {zlib.crc32(repr(dataset.segments).encode(), number):08x}"


def origin(cfg, stage):
    """What a result remembers of how it was made.

    Settings, code (see fingerprint.py), and which results it was made from."""
    return dict(
        stamp=stamp(cfg, stage),
        code=code(cfg, stage),
        made_from={other: mark(found_origin(cfg, other)) for other in STAGES[stage][1]},
    )


def code(cfg, stage):
    """The code that a stage of this run uses: not the adapter of a simulator that it does not run in and,
    where it records, not what cuts somebody's recording."""
    unused = []
    if cfg.sim != "calvin":
        unused.append("support.calvin_real")
    if stage in ("play", "demos") and not cfg.data:
        unused.append("data.commanded_targets")
    return {name: number for name, number in code_of(stage).items() if not name.startswith(tuple(unused))}


def mark(found):
    """A short name for a result: two that were made alike have the same."""
    return f"{zlib.crc32(json.dumps(found, sort_keys=True).encode()):08x}"


def found_origin(cfg, stage):
    """The origin that an existing result remembers, or None where there is none.

    Results of older versions remember their settings only."""
    path = output(cfg, stage)
    path = path / "meta.json" if stage in ("play", "demos") else path
    return read_origin(path, path.stat().st_mtime_ns) if path.exists() else None


@functools.lru_cache(maxsize=64)
def read_origin(path, changed):
    content = load_file(path)
    return {key: content[key] for key in ("stamp", "code", "made_from") if key in content}


def other_settings(cfg, stage, found):
    """Settings of a result that are not today's -> {name: (then, now)}; a new one then had its default."""
    then = found.get("stamp", {})
    now = stamp(cfg, stage)
    pairs = {}
    for field in dataclasses.fields(cfg):
        if field.name in {*then, *now}:
            pairs[field.name] = then.get(field.name, field.default), now.get(field.name, field.default)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def first_six(names):
    """The first six, and dots where there are more."""
    return ", ".join(names[:6]) + " ..." * (len(names) > 6)


def other_code(cfg, stage, found):
    """Has the code that made a result changed, or have the results that it was made from?

    -> (the stage to do again, what has changed), or None

    --keep wm uses the wm as it is, and so says nothing of it."""
    if stage not in cfg.keep.split(",") and "code" in found:
        now = code(cfg, stage)
        then = found["code"]
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if changed:
            return stage, f"the code of {first_six(changed)} has changed"
        sources = found["made_from"].items()
        remade = [other for other, name in sources if mark(found_origin(cfg, other)) != name]
        if remade:
            return stage, f"{' and '.join(remade)} has been made anew"
    if stage not in cfg.keep.split(","):
        for other in STAGES[stage][1]:
            below = found_origin(cfg, other)
            if below and (change := other_code(cfg, other, below)):
                return change
    return None


def load(cfg, stage):
    """The result of an earlier stage, if it was made with today's settings and code.

    Anything else is an error that names the difference."""
    path = output(cfg, stage)
    found = found_origin(cfg, stage)
    if found is None:
        whole = ", or --stage all" if stage in PIPELINE else ""
        raise InputError(f"{path} is missing: run --stage {stage} first{whole}")
    for name, (then, now) in other_settings(cfg, stage, found).items():
        owner = next(other for other in STAGES if made_with_other(cfg, other, name))
        back = "the earlier --data" if name == "data" else f"--{name} {then}"
        raise InputError(f"{path} was made with {name}={then}, but the settings now say {name}={now}: "
                         f"run --stage {owner} again (or --stage all), or give {back}")
    if change := other_code(cfg, stage, found):
        raise outdated(cfg, *change)
    if stage == "play":
        return Dataset(path, cfg.data)                      # somebody's recording may have moved since
    return Dataset(path) if stage == "demos" else load_file(path, cfg.device)


def made_with_other(cfg, stage, name):
    """Is there a result of the stage that was made with another value of the setting `name`?"""
    found = found_origin(cfg, stage)
    return bool(found) and name in other_settings(cfg, stage, found)


def outdated(cfg, stage, change):
    return InputError(f"{output(cfg, stage)} is not what today's code would make ({change}): "
                      f"run --stage {stage} again (or --stage all), or use it as it is with --keep {stage}")


def load_heldout(cfg):
    """Demonstrations that only judge, recorded beside the play.

    None where there are none (--play_replay 0, or no segments)."""
    folder = output(cfg, "play").with_name("replay")
    return Dataset(folder) if folder.exists() else None


def heldout_recording(cfg, wm):
    """The same as a Recording that the world model can look at, or None."""
    dataset = load_heldout(cfg)
    return dataset and Recording(cfg, dataset, wm)


def policy_weights(cfg, policy):
    """The weights of an actor: of "bc", "tuned", "online" or the iteration of a snapshot."""
    if policy in ("bc", "online"):
        return load(cfg, policy)["actor"]
    tuned = load(cfg, "finetune")
    if policy == "tuned":
        return tuned["actor"]
    if policy not in tuned["snapshots"]:
        raise InputError(f"there is no snapshot {policy}: give {', '.join(tuned['snapshots'])}, tuned or bc")
    snapshot = {f"net.{name}": value for name, value in tuned["snapshots"][policy].items()}
    return dict(tuned["actor"], **snapshot)


def fill(network, weights, whose):
    """Give a network the weights of a stage or a policy, all of them and no others."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:                           # --keep uses what older code has left
        differs = str(error).splitlines()[1].strip()
        raise InputError(f"the weights of {whose} are of another network than today's ({differs}): "
                         f"let its stage be done again, without --keep") from error


def save(path, content):
    def write(temporary):
        try:
            torch.save(content, temporary)
        except RuntimeError as error:                       # torch reports a full disk as a RuntimeError
            raise OSError(str(error).splitlines()[0]) from error

    write_atomic(path, write)


def save_result(cfg, stage, **content):
    """Write a stage's checkpoint, with its origin, and drop what was kept in case of a kill."""
    if parallel.rank():
        return
    save(output(cfg, stage), dict(origin(cfg, stage), **content))
    partial_path(cfg, stage).unlink(missing_ok=True)


def load_file(path, device="cpu"):
    """A checkpoint (tensors and plain containers only) or a JSON file."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}") from error
    except Exception as error:
        raise InputError(f"{path} is damaged or was not written by this program ({type(error).__name__}): "
                         "delete it and run the same command again") from error


# --- a loop that can be killed ------------------------------------------------------------------------------

def seed_everything(*words):
    """Seed torch from the words and return a numpy generator seeded alike."""
    number = zlib.crc32(repr(words).encode())
    torch.manual_seed(number)
    return np.random.default_rng(number)


def partial_path(cfg, stage):
    path = output(cfg, stage)
    return path.with_name(path.stem + ".partial.pt")


def saved_work(cfg, stage):
    """What a killed run of the same settings had saved -> (its number of updates, {name: state})"""
    partial = partial_path(cfg, stage)
    content = load_file(partial, cfg.device) if partial.exists() else {}
    if content.get("origin") != origin(cfg, stage):
        return 0, {}
    return content["done"], content["state"]


def restore(cfg, stage, state):
    """Put what a killed run had saved back into state, as Updates takes it.

    -> the number of updates that it had done, 0 if there is nothing"""
    done, saved = saved_work(cfg, stage)
    for name, kept in saved.items():
        state[name].load_state_dict(kept)
    return done


def first_seed(cfg, purpose, task=None):
    """The first simulator seed for play, heldout, demos, eval, curve or official; none is shared by two."""
    places = {"play": (0, 0), "heldout": (500_000, 1000), "demos": (700_000, 10_000),
              "eval": (900_000, 10_000), "curve": (905_000, 10_000), "official": (907_500, 10_000)}
    base, step = places[purpose]
    return 1_000_000 * (cfg.seed + 1) + base + step * (list(calvin_sim.TASKS).index(task) if task else 0)


def cosine_lr(optimizer, peak, step, total, warmup=100, floor=0.1):
    """Linear warm-up, then half a cosine from peak to floor * peak."""
    rise = min(1.0, (step + 1) / warmup)
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * fall


def half_precision(cfg, device):
    """bfloat16 for the matrices and convolutions of a `with` block that runs on this kind of device, if the
    device has it and wm_bf16 is on; what sums stays in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=in_half(cfg, device))


def in_half(cfg, device):
    """Is bfloat16 wanted, on this kind of device, and does the device have it?"""
    return bool(cfg.wm_bf16 and cfg.device == device) and has_bfloat16(device)


def cast_once(cfg, device, model, parts):
    """A copy of a frozen model, the matrices in these parts cast for good to what half_precision would cast
    them to at every use: autocast keeps a cast only of weights that learn.  The same numbers, sooner; these
    parts work under half_precision alone.  Where nothing is cast, the model itself."""
    if not in_half(cfg, device):
        return model
    model = copy.deepcopy(model)
    for part in parts:
        for layer in getattr(model, part).modules():
            if isinstance(layer, torch.nn.Linear):
                layer.to(torch.bfloat16)
    return model


def has_bfloat16(device):
    """Does it multiply matrices of bfloat16 faster than others?"""
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


class Updates:
    """The updates of a stage, and around them what no paper mentions: resuming, the log, progress, NaNs.

        updates = Updates(cfg, "wm", total, state)
        for i, rng in updates:
            ...                                             # one gradient step; rng is numpy's
            updates.log(metrics)                            # {name: 0-d tensor}

    state: {name: object}; what has a state_dict is saved every SAVE_EVERY seconds and restored when the
    program was killed.  Update i draws its random numbers from (seed, stage, task, i), so a resumed run ends
    as if nothing had happened.  Losses stay on the device and are looked at every `every` updates."""

    def __init__(self, cfg, stage, total, state, every=20):
        self.cfg = cfg
        self.stage = stage
        self.total = total
        self.state = state
        self.every = every
        self.pending = []
        self.log = self.pending.append

    def __iter__(self):
        cfg, stage = self.cfg, self.stage
        key = (cfg.seed, stage, cfg.task if STAGES[stage][2] else "")
        saved = time.time()
        if done := restore(cfg, stage, self.state):
            print(f"  {stage} resumes at {done:,} of {self.total:,}")
        others = parallel.rank() > 0                        # of several processes only the first writes
        write = None if others else Log(cfg, stage)
        progress = Progress(stage, self.total, done)
        while done < self.total:                            # a loop that has had enough lowers it
            rng = seed_everything(*key, done)
            if others:                                      # the same batch, other noise
                torch.manual_seed(torch.initial_seed() + parallel.rank())
            yield done, rng
            done += 1
            if done % self.every and done < self.total:
                continue
            metrics = self.mean_of_pending(done)
            if others:
                continue
            write(done, metrics)
            progress(done, "  ".join(f"{n} {v:.4g}" for n, v in metrics.items()))
            if time.time() - saved > SAVE_EVERY and done < self.total:
                kept = {name: thing for name, thing in self.state.items() if hasattr(thing, "state_dict")}
                states = {name: thing.state_dict() for name, thing in kept.items()}
                save(partial_path(cfg, stage), dict(origin=origin(cfg, stage), done=done, state=states))
                saved = time.time()

    def mean_of_pending(self, step):
        """The metrics since the last look -> {name: their mean}; one that is not finite is an error."""
        metrics = {}
        for name in self.pending[-1]:
            values = [p[name].detach().float() for p in self.pending]
            metrics[name] = torch.stack(values).mean().item()
        for name, value in metrics.items():
            if not math.isfinite(value):
                prefix = STAGES["finetune" if self.stage == "online" else self.stage][0]
                names = [field.name for field in dataclasses.fields(self.cfg)]
                rates = [f"--{name}" for name in names if re.fullmatch(f"{prefix}.*lr", name)]
                raise InputError(f"stage {self.stage}: the term '{name}' became {value} between steps "
                                 f"{step + 1 - len(self.pending)} and {step}: "
                                 f"give a smaller {' or '.join(rates)}, and the stage begins anew")
        self.pending.clear()
        return metrics


class Snapshots(dict):
    """{iteration: weights, or a number}, saved and resumed with the rest of a training state."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, content):
        self.update(content)


class Stopwatch:
    """The minutes that a stage takes; a file beside its output keeps them, so those before a kill count."""

    def __init__(self, cfg, stage):
        path = output(cfg, stage)
        self.path = path.with_name(f"{path.stem}.minutes.json")
        self.work = mark(origin(cfg, stage))
        kept = load_file(self.path) if self.path.exists() else {}
        before = kept["minutes"] if kept.get("work") == self.work else 0.0
        self.start = time.time() - 60 * before

    def minutes(self):
        return (time.time() - self.start) / 60

    def keep(self):
        text = json.dumps(dict(work=self.work, minutes=self.minutes()))
        write_atomic(self.path, lambda path: path.write_text(text))

    def stop(self):
        self.path.unlink(missing_ok=True)
        return self.minutes()


class Progress:
    """One line with the time left: rewritten on a terminal, printed every 15 seconds into a log file."""
    stopwatch = None                                        # of the stage that this process is in

    def __init__(self, name, total, done=0):
        self.name = name
        self.total = total
        self.first = done
        self.start = time.time()
        self.shown = 0.0
        self.kept = 0.0

    def __call__(self, done, text=""):
        if done <= self.first:                              # was there, so it says nothing of the speed
            return
        tty = sys.stdout.isatty()
        now = time.time()
        if now - self.shown < (0.5 if tty else 15) and done < self.total:
            return
        self.shown = now
        if self.stopwatch and now - self.kept > 10:
            self.kept = now
            self.stopwatch.keep()
        rate = max(done - self.first, 1e-9) / (now - self.start + 1e-9)
        left = int((self.total - done) / rate)
        line = (f"  {self.name:<14} {done:>7,}/{self.total:,}  {rate:8.1f}/s  "
                f"{left // 60:3d}:{left % 60:02d} left  {text}")
        if tty:
            line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="\n" if not tty or done >= self.total else "", flush=True)


class Log:
    """runs/<name>/log.csv, long format: stage, task, step, metric, value.

    Rows of a stage that is done again are replaced: those after the step where it begins, `first`, are cut.

    Several tasks may be at work in one folder, so whoever writes holds the log's lock."""

    def __init__(self, cfg, stage, first=sys.maxsize):
        self.path = Path(cfg.runs) / cfg.run / "log.csv"
        self.key = [stage, cfg.task if STAGES[stage][2] else ""]
        with writing(self.path), self.lock():
            keep = [r for r in log_rows(self.path) if r[:2] != self.key or int(r[2]) <= first]
            text = "\n".join(",".join(r) for r in [LOG_COLUMNS] + keep) + "\n"
            write_atomic(self.path, lambda p: p.write_text(text))

    def lock(self):
        return FileLock(self.path.with_name(".log.csv.lock"))

    def __call__(self, step, metrics):
        lines = []
        for name, value in metrics.items():
            lines.append(",".join([*self.key, str(step), name, f"{value:.6g}"]) + "\n")
        with writing(self.path), self.lock():
            with self.path.open("a") as f:
                f.writelines(lines)


LOG_COLUMNS = ["stage", "task", "step", "metric", "value"]


def log_rows(path):
    """The whole rows of a log.csv, as lists of five words; a kill or an editor may have torn others."""
    if not path.exists():
        return []
    number = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|nan|inf)")
    rows = [line.split(",") for line in path.read_text(errors="replace").splitlines()]
    return [r for r in rows if len(r) == 5 and r[2].isdecimal() and number.fullmatch(r[4])]


def run_stage(cfg, stage, work):
    """Do a stage, work(cfg), unless its output is there for the same settings.

    What it reads is checked first."""
    path = output(cfg, stage)
    found = found_origin(cfg, stage)
    settings = other_settings(cfg, stage, found) if found else {}
    change = other_code(cfg, stage, found) if found and not settings else None
    if change and change[0] != stage:
        raise outdated(cfg, *change)
    if found and not settings and not change:
        print(f"{stage}: {path} is there for the same settings, skipped")
        return
    for other in STAGES[stage][1]:
        load(cfg, other)
    if settings or change:
        minutes = read_log(cfg, stage, "minutes")[1]
        took = f", which took {minutes[-1]:.1f} min last time" if minutes else ""
        if change:
            why, instead = change[1], f" (--keep {stage} would use it as it is)"
        else:
            changed = [f"{name} was {then}, is {now}" for name, (then, now) in settings.items()]
            why, instead = first_six(changed), ""
        print(f"{stage}: {why}; it is done again{took}{instead}")
    if parallel.rank():
        return work(cfg)
    with alone(path, stage):
        remember(cfg)
        print(f"{stage}: writes {path}")
        log = Log(cfg, stage, first=saved_work(cfg, stage)[0])
        Progress.stopwatch = watch = Stopwatch(cfg, stage)
        try:
            work(cfg)
        finally:
            Progress.stopwatch = None
        minutes = watch.stop()
        log(0, dict(minutes=minutes))
    print(f"{stage}: done in {minutes:.1f} min", flush=True)


@contextlib.contextmanager
def alone(path, what):
    """Two programs never write the same result.

    The lock is the operating system's, so a killed program leaves none behind."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another program is at stage {what} of {path} right now: "
                             "wait until it is done, or give another --run") from None
    try:
        yield
    finally:
        lock.release()


def read_log(cfg, stage, metric):
    """(steps, values) of one metric of a stage."""
    key = [stage, cfg.task if STAGES[stage][2] else ""]
    rows = [r for r in log_rows(Path(cfg.runs) / cfg.run / "log.csv") if r[:2] == key and r[3] == metric]
    return [int(r[2]) for r in rows], [float(r[4]) for r in rows]


def in_processes(cfg, function, jobs, name, done=0):
    """Yield function(job) for all jobs, in their order, from cfg.workers processes, with a progress line.

    done: how many of them an earlier run has left behind, so that they return at once.

    A worker that dies (killed, out of memory) ends it with one sentence; multiprocessing's own Pool would
    wait for ever."""
    progress = Progress(name, len(jobs), done)
    context = worker_context()
    others = multiprocessing.active_children()
    again = "then type the same command again: it goes on where it stopped"
    try:
        workers = min(cfg.workers, len(jobs))
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, calm_torch_worker)
        futures = [pool.submit(function, job) for job in jobs]
    except OSError as error:                                # its locks lie in /dev/shm on Linux
        raise InputError(f"no worker processes can be started for {name} ({error.strerror or error}): "
                         f"make room in /dev/shm (in Docker: --shm-size=64m), {again}") from error
    try:
        for i, future in enumerate(futures):
            result = future.result()
            progress(i + 1)
            yield result
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - set(others):
            child.terminate()                               # it may be in the middle of minutes of work
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise InputError(f"a worker process of {name} died (killed, or for lack of memory?): "
                             f"free some memory or give fewer --workers, {again}") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def apart(sim, function, *args):
    """function(*args), with calvin_env in a copy of this process -> its result, small enough to be sent.

    Bullet solves contacts in an order that depends on what it solved before, and a restored state does not
    restore that; a tabletop is built anew.  The copy (fork) begins where this process stands and takes its
    traces with it.  Only Linux copies a process safely; elsewhere the function is simply called."""
    if sim != "calvin" or sys.platform != "linux":
        return function(*args)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work():
        calm_worker()
        try:
            send.send((function(*args), None))
        except Exception as error:
            send.send((None, error))

    process = context.Process(target=work)
    with warnings.catch_warnings():                         # a fork beside threads: ours only wait
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    send.close()                                            # so that its death is noticed
    try:
        result, error = receive.recv()
    except EOFError as end:
        raise InputError("a copy of a worker process died (killed, or for lack of memory?): free some memory "
                         "or give fewer --workers, then type the same command again") from end
    finally:
        process.join()
        receive.close()
    if error:
        raise error
    return result


def worker_context():
    """How worker processes begin: where it can be, from a clean process that has the big packages already."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["torch", "calvin_sim"])  # once for all: it takes seconds
    return context


def calm_worker():
    """Set up a worker process: Ctrl-C is its parent's business; when that is killed it must not live on."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def calm_torch_worker():
    """A worker is one thread, leaves Ctrl-C to its parent, and ends when its parent does."""
    calm_worker()
    torch.set_num_threads(1)


# --- simulators ---------------------------------------------------------------------------------------------

def sim_of(cfg):
    return dict(sim=cfg.sim, image_size=cfg.image_size, calvin_root=cfg.calvin_root)


def make_sim(sim, image_size, calvin_root):
    if sim == "tabletop":
        return calvin_sim.Tabletop(image_size)
    return calvin_real.RealCalvin(image_size, root=calvin_root)


# --- settings that cannot work ------------------------------------------------------------------------------

CHOICES = {
    "sim": tuple(RENDERERS),
    "device": ("auto", "cpu", "cuda"),
    "stage": (*STAGES, "report", "all"),
    "wm_encoder": ("linear", "conv"),
    "wm_latent": ("gaussian", "categorical"),
    "bc_net": ("mlp", "unet"),
    "bc_actor": ("diffusion", "gaussian"),
    "reward_labels": ("unlabelled", "demos", "predicate", "strict", "state"),
}
COUNTS = ("play_replay", "wm_octaves", "ft_warmup")
POSITIVE = ("wm_lr", "bc_lr", "reward_lr", "ft_actor_lr", "ft_critic_lr", "wm_clip", "reward_tau", "ft_clip",
            "ft_clip_first")
SHARES = ("wm_balance", "wm_lr_end", "bc_ema", "ft_ema", "ft_starts", "ft_play", "ft_gamma", "ft_lambda",
          "ft_gamma_denoise")
RANGES = dict(  # lowest and highest; of all other numbers the whole ones start at 1 and the others at 0
    **dict.fromkeys(COUNTS, (0, 10 ** 9)),
    **dict.fromkeys(POSITIVE, (1e-12, 1e30)),
    **dict.fromkeys(SHARES, (0, 1)),
    ft_twice=(0, 1),
    ft_std=(0.055, 1e6),           # narrower, most densities would reach gaussian_logprob's upper clamp
    wm_bf16=(0, 1),
    wm_unimix=(0, 0.999),
    wm_decode=(1e-6, 1),
    seed=(0, 10 ** 9),
    eval_episodes=(1, 5000),        # first_seed has room for so many
    eval_curve=(0, 2500),
    eval_official=(0, 2500),
    wm_heads=(0, 100),
    image_size=(8, 512),
    workers=(1, 256),
    wm_codes=(2, 10 ** 6),
    wm_classes=(2, 10 ** 6),
    wm_length=(2, 10 ** 6),
    play_episode=(12, 10 ** 6),
)


def check_config(cfg):
    """Settings that cannot work are refused now, not after hours; the device is chosen.  -> cfg"""
    for name, allowed in CHOICES.items():
        known(getattr(cfg, name), allowed, name)
    for field in dataclasses.fields(cfg):
        if field.type in (int, float):
            value = getattr(cfg, field.name)
            low, high = RANGES.get(field.name, (1, 10 ** 9) if field.type is int else (0, 1e6))
            if not low <= value <= high:                    # a NaN is not, either
                raise InputError(f"--{field.name} {value} is out of range: give {low:g} to {high:g}")
    if cfg.sim == "none" and not cfg.data:
        raise InputError("--sim none has nothing to record in: give a dataset with --data, "
                         "or choose --sim tabletop")
    if cfg.sim == "calvin":
        calvin_real.import_calvin_env(cfg.calvin_root)      # now, not after hours of training
    given = check_data(cfg) if cfg.data else None
    for task in play_tasks(cfg):
        known(task, calvin_sim.TASKS, "play_tasks")
    if not given and cfg.task in calvin_sim.TASKS and cfg.task not in play_tasks(cfg):
        raise InputError(f"play that tries only {cfg.play_tasks} teaches nothing of {cfg.task}: "
                         f"give --play_tasks {cfg.play_tasks},{cfg.task}, or all")
    tasks = tasks_of(cfg)
    if given and cfg.task not in [*tasks, "all"]:
        raise InputError(f"{cfg.data} has no segments of {cfg.task} to clone: "
                         f"choose --task {', '.join(tasks)}, or all")
    known(cfg.task, [*tasks, "all"], "task")
    if cfg.policy and (cfg.stage != "eval" or cfg.sim == "none"):
        simulator = " --sim tabletop" if cfg.sim == "none" else ""
        raise InputError(f"--policy {cfg.policy} is for --stage eval in a simulator: "
                         f"give --stage eval{simulator} --policy {cfg.policy}")
    if cfg.policy and cfg.policy not in ("bc", "tuned", "online") and not cfg.policy.isdecimal():
        raise InputError(f"--policy {cfg.policy} is unknown: give bc, tuned, online or the iteration of a "
                         "snapshot")
    for stage in filter(None, cfg.keep.split(",")):
        known(stage, STAGES, "keep")
    if cfg.stage == "online" and (cfg.sim != "tabletop" or not cfg.eval_curve):
        raise InputError("--stage online practises in many tabletops at once, until it is as good from the "
                         "start states of the learning curve: give --sim tabletop and --eval_curve 40")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but this torch sees no CUDA device: "
                         "use --device cpu")
    if parallel.size() > 1 and (cfg.stage != "wm" or cfg.wm_batch % parallel.size()):
        raise InputError(f"torchrun's {parallel.size()} processes share the batches of the world model: give "
                         f"--stage wm and a --wm_batch that is a multiple of {parallel.size()}, "
                         "and the other stages without torchrun")
    if cfg.device == "cuda":
        torch.set_float32_matmul_precision("high")          # TF32
    if cfg.wm_encoder == "conv" and cfg.image_size != 64:
        raise InputError(f"--wm_encoder conv is built for 64x64 frames, not --image_size {cfg.image_size}: "
                         "use --wm_encoder linear")
    frames = len(given) if given else max(10, cfg.play_frames // cfg.play_episode) * cfg.play_episode
    most = min(3 * cfg.image_size ** 2, FITTED_ON, frames - frames // 10)    # one in ten is held out
    if cfg.wm_encoder == "linear" and cfg.wm_codes > most:
        raise InputError(f"--wm_codes {cfg.wm_codes} is more than {frames} frames of {cfg.image_size} px "
                         f"have: give at most {most}")
    if cfg.bc_actor == "gaussian" and cfg.bc_net == "unet":
        raise InputError("--bc_net unet is a denoiser, and --bc_actor gaussian has none: give --bc_net mlp")
    if cfg.bc_actor == "diffusion" and cfg.ft_steps > cfg.bc_steps:
        raise InputError(f"--ft_steps (K') must lie between 1 and --bc_steps (K = {cfg.bc_steps}), "
                         f"not {cfg.ft_steps}")
    if cfg.ft_iterations <= cfg.ft_warmup:
        raise InputError(f"--ft_iterations {cfg.ft_iterations} would train the critic only, for the actor "
                         f"waits for --ft_warmup {cfg.ft_warmup}: give more iterations or less warm-up")
    chunks = cfg.ft_dreams * cfg.ft_chunks
    if cfg.ft_minibatches > chunks:
        raise InputError(f"--ft_minibatches {cfg.ft_minibatches} is more than the {chunks} chunks of a "
                         "rollout (--ft_dreams x --ft_chunks): give fewer")
    if cfg.ft_horizon > cfg.ft_chunks:
        raise InputError(f"--ft_horizon {cfg.ft_horizon} would cut no dream, for all begin anew after "
                         f"--ft_chunks {cfg.ft_chunks}: give --ft_horizon {cfg.ft_chunks}")
    window = (cfg.wm_length - 1) * cfg.wm_stride + 1
    if window > cfg.play_episode:
        raise InputError(f"--wm_length {cfg.wm_length} x --wm_stride {cfg.wm_stride} is a window of {window} "
                         f"frames, and --play_episode {cfg.play_episode} is shorter: "
                         "give a smaller --wm_length or a longer --play_episode")
    if cfg.bc_chunk % cfg.wm_stride:
        raise InputError(f"--bc_chunk {cfg.bc_chunk} must be a multiple of --wm_stride {cfg.wm_stride}: "
                         "a chunk is dreamed in whole steps of the world model")
    if cfg.eval_steps < cfg.bc_chunk:
        raise InputError(f"--eval_steps {cfg.eval_steps} ends before the first chunk does: "
                         f"give --bc_chunk {cfg.bc_chunk} or more")
    if cfg.bc_net == "unet" and cfg.bc_chunk % 4:
        raise InputError("--bc_net unet halves the chunk twice, so --bc_chunk must be a multiple of 4, "
                         f"not {cfg.bc_chunk}")
    asked = tasks if cfg.task == "all" else [cfg.task]
    ruleless = [task for task in asked if task not in calvin_sim.TASKS]
    lack = f"no rule of {ruleless[0]} is known" if ruleless else ""
    if given and not given.has_scene:
        lack = f"{cfg.data} has no scene state (scene_obs)"
    if lack and cfg.reward_labels in ("predicate", "strict", "state"):
        raise InputError(f"--reward_labels {cfg.reward_labels} asks the task's rule, but {lack}: "
                         "give --reward_labels unlabelled")
    if cfg.reward_labels == "state" and not cfg.wm_state:
        raise InputError("--reward_labels state applies the task's rule to the scene that the world model "
                         "tells, and it tells none: give --wm_state 100")
    if cfg.wm_heads == 1 or cfg.ft_doubt and not cfg.wm_heads:
        raise InputError(f"--ft_doubt asks where several priors disagree, and --wm_heads is {cfg.wm_heads}: "
                         "give --wm_heads 5")
    if cfg.wm_state and given and not given.has_scene:
        raise InputError(f"--wm_state teaches the world model the scene's state, but {cfg.data} has none "
                         "(scene_obs): give --wm_state 0")
    return cfg


def play_tasks(cfg):
    """The tasks that recorded play tries, and that the world model is judged by."""
    return list(calvin_sim.TASKS) if cfg.play_tasks == "all" else cfg.play_tasks.split(",")


def tasks_of(cfg):
    """The tasks that a run can be about.

    Those that its play tries, by default CALVIN's eight; of a recording, those that it has segments of (and
    the simulator, if any, knows)."""
    recorded = play_tasks(cfg)
    if cfg.data:
        recorded = list(dict.fromkeys(task for task, _, _ in Dataset(cfg.data).segments))
    known_ones = [task for task in calvin_sim.TASKS if task in recorded or not recorded]
    return known_ones + [task for task in recorded if task not in known_ones and cfg.sim == "none"]


def check_data(cfg):
    """The dataset of --data, if a run with these settings can use it."""
    given = Dataset(cfg.data)
    if given.image_size != cfg.image_size:
        raise InputError(f"{cfg.data} holds frames of {given.image_size} px, not {cfg.image_size}: "
                         f"give --image_size {given.image_size}, or import it again")
    renderer = given.meta.get("renderer")
    if cfg.sim != "none" and renderer != RENDERERS[cfg.sim]:
        print(f"warning: {cfg.data} was rendered by '{renderer}' and --sim {cfg.sim} renders by "
              f"'{RENDERERS[cfg.sim]}': the policy will meet pictures that it was not trained on")
    return given


# --- the command line ---------------------------------------------------------------------------------------

def command_line(argv, config, presets, stage_work, title):
    """Run a command line; stage_work: {stage: function(cfg)}.

    -> the exit code: 0, 2 when something given cannot be used, 130 when interrupted"""
    if called_by_a_worker():
        print("diwa: a script calls diwa.main() while it is being imported by a worker process: "
              "put that call under 'if __name__ == \"__main__\":'", file=sys.stderr)
        sys.exit(2)
    try:
        epilog = f"tasks: {', '.join(calvin_sim.TASKS)}"
        run(check_config(parse(argv, config, presets, title, epilog)), stage_work)
    except InputError as error:
        print(f"\ndiwa: {error}", file=sys.stderr)
        return 2
    except OSError as error:                                # a file that nothing above expected trouble with
        print(f"\ndiwa: the file system refuses ({error}): {ELSEWHERE}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        what = str(error).splitlines()[0] if str(error) else "no more of it"
        print(f"\ndiwa: out of memory ({what}): try a smaller --wm_batch or fewer --ft_dreams, "
              "then run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndiwa: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def called_by_a_worker():
    """Is this program running in a process that is just being started?

    Then a script without a main guard has called it once more."""
    # what multiprocessing itself looks at
    return getattr(multiprocessing.current_process(), "_inheriting", False)


DEMO_FRAMES = 75                                            # of a demonstration, about: for disk space
# Minutes of each stage at Config's own values on two idle cores of a busy server (CALVIN: of another server,
# from a run of 153), the world model in bfloat16; how batch, float32 and latents change them is below
REFERENCE = {
    "tabletop": dict(play=4.7, demos=0.1, wm=8.4, bc=0.5, reward=0.4, finetune=1.5, eval=0.7),
    "calvin": dict(play=39, demos=0.7, wm=3.6, bc=0.5, reward=0.8, finetune=1.45, eval=5.1),
}
UPDATE_COSTS = 70                 # sequences' worth of time, whatever an update's batch is
FLOAT32_COST = 1.2                # of bfloat16's time: two threads of a Xeon with AMX (an EPYC: 1.4 to 2)
CATEGORICAL_COST = 0.9            # of a Gaussian update's time on top: 32 x 32 on an EPYC (a Xeon: 0.8)
GROWS_WITH = dict(
    play=["play_frames"],
    demos=["demo_count"],
    wm=["wm_updates", "wm_length"],                         # and with the batch, see below
    bc=["bc_updates", "bc_batch"],
    reward=["reward_updates"],
    finetune=["ft_iterations", "ft_dreams", "ft_chunks"],
    eval=["eval_episodes"],
)


def expectation(cfg, tasks):
    """What a whole run will take, in a sentence for its start; "" where that has not been measured."""
    if cfg.sim not in REFERENCE or cfg.data or cfg.device != "cpu" or cfg.wm_encoder != "linear":
        return ""
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    minutes = {}
    for stage, reference in REFERENCE[cfg.sim].items():
        factors = [getattr(cfg, name) / defaults[name] for name in GROWS_WITH[stage]]
        minutes[stage] = reference * math.prod(factors)
    minutes["wm"] *= (cfg.wm_batch + UPDATE_COSTS) / (defaults["wm_batch"] + UPDATE_COSTS)
    if not in_half(cfg, cfg.device):
        minutes["wm"] *= FLOAT32_COST
    if cfg.wm_latent == "categorical":
        minutes["wm"] *= 1 + CATEGORICAL_COST * cfg.wm_z * cfg.wm_classes / 32 ** 2
    shared = {stage: minutes[stage] for stage in ("play", "wm")}
    each = {stage: value for stage, value in minutes.items() if stage not in shared}
    total = sum(shared.values()) + tasks * sum(each.values())

    def listed(stages):
        return ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items())

    demonstrations = tasks * cfg.demo_count + len(play_tasks(cfg)) * cfg.play_replay
    frames = cfg.play_frames + demonstrations * DEMO_FRAMES
    gigabytes = frames * frame_bytes(cfg.image_size) / 1e9
    digits = 1 if total < 10 else 0
    return (f"expected on two cores of a server, in minutes: {listed(shared)}; for each of {tasks} tasks "
            f"{listed(each)}; together {total:.{digits}f}, and {gigabytes:.1f} GB")


def run(cfg, stage_work):
    """The stages of --stage for the tasks of --task, one after the other."""
    parallel.take_device(cfg.device)
    definitions()                         # the code as it is now: an editor may change it during the run
    stages = [*PIPELINE, "report"] if cfg.stage == "all" else [cfg.stage]
    tasks = tasks_of(cfg) if cfg.task == "all" else [cfg.task]
    if cfg.stage == "all" and (line := expectation(cfg, len(tasks))):
        print(line)
    for task in tasks:
        cfg = dataclasses.replace(cfg, task=task)
        for stage in stages:
            if stage in STAGES and not cfg.policy:
                run_stage(cfg, stage, stage_work[stage])
            else:
                stage_work[stage](cfg)
    parallel.leave()
    if not parallel.rank() and not cfg.policy:              # a trial of one policy changes nothing
        remember(cfg)
    if len(tasks) > 1 and "report" in stages:
        rows = [load_file(Path(cfg.runs) / cfg.run / f"result_{task}.json") for task in tasks]
        print("\n".join(["", *report.table(rows)]))
