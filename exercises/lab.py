"""lab.py: what the experiments among the exercises need: variants of a class run, and their success.

An experiment begins with your prediction, and is worth nothing without.  It then trains variants of a run
(python diwa.py --stage all --preset class, five minutes) in folders of their own beside it, prints each
command that it gives, so that you can give it yourself, and compares.  Where it also replaces a part of
diwa.py while the command runs, it says so: the command alone would not do the same.
"""
import argparse
import contextlib
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np

from verdict import HERE, load                              # which also finds diwa.py

import calvin_sim
import diwa
from support import evaluate
from support.files import InputError
from support.presets import PRESETS
from support.runs import check_config, load_file, parse, read_log


class Lab:
    """A finished run, and what an experiment may do with copies of it."""

    def __init__(self, runs, run, starts, more=()):
        """more: flags of diwa.py that hold for every variant"""
        self.runs = Path(runs)
        self.run = run
        self.starts = starts
        self.more = more
        folder = self.runs / run
        for needed in ("config.json", "wm.pt", "eval_*.json"):
            if not list(folder.glob(needed)):
                raise InputError(f"{folder / needed} is missing, and experiments are about a finished run: "
                                 "type 'python diwa.py --stage all --preset class', or give another --run")
        self.task = load_file(folder / "config.json")["settings"]["task"]

    def cfg(self, name="", *flags):
        """The settings of the run, or of its variant."""
        words = [*self.where(name), *flags, *(self.more if name else ())]
        return check_config(parse(words, diwa.Config, PRESETS, "", ""))

    def where(self, name):
        run = f"{self.run}_{name}" if name else self.run
        return ["--runs", str(self.runs), "--run", run, "--task", self.task]

    def variant(self, name, *flags, stages, change=None):
        """Do these stages anew in a copy of the run, with other flags, or with `change` = {name in diwa.py:
        something else} -> the settings of the copy"""
        source, folder = self.runs / self.run, self.runs / f"{self.run}_{name}"
        anew = tuple(f"{stage}_{self.task}" for stage in stages)

        def others(folder):
            return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.pt") if not p.name.startswith(anew)}

        if folder.exists() and others(folder) != others(source):
            shutil.rmtree(folder)                           # of an older run of that name, or torn
        if not folder.exists():
            copy_run(source, folder, anew)
        replaced = f"   # and with another {', '.join(change)}, which no flag gives" if change else ""
        with changed(change or {}):
            for stage in stages:
                words = [*self.where(name), "--stage", stage, *flags, *self.more]
                print(f"\npython diwa.py {' '.join(words)}{replaced}", flush=True)
                if diwa.main(words):
                    raise SystemExit(2)
        return self.cfg(name, *flags)

    def episodes(self, cfg, policy, change=None):
        """In the simulator, from start states of the learning curve, which no report is about, so many as
        --starts says -> [dict], see support/evaluate.py, run_episodes.  In this process: a worker would not
        know of the change"""
        _, seeds = evaluate.start_seeds(cfg)
        seeds = [int(seeds[0]) + i for i in range(self.starts)]
        size = 10 if cfg.sim == "tabletop" else 1           # CALVIN's are one a process
        groups = [seeds[i:i + size] for i in range(0, len(seeds), size)]
        print(f"  evaluating {policy} of {cfg.run} from {self.starts} start states", flush=True)
        with changed(change or {}):
            return evaluate.evaluation_job(dict(cfg=cfg, load_agent=diwa.load_agent, policy=policy,
                                                groups=groups, record=(), draw=calvin_sim.sample_start))

    def believed(self, cfg):
        """Percent of the failures in held-out play that the classifier takes for successes."""
        (_, _), (believed, seen_through) = diwa.load(cfg, "reward")["trust"]["play"]
        return 100 * believed / max(1, believed + seen_through)

    def curve(self, cfg, stage, metric):
        """The values of a metric in the log of a stage."""
        return read_log(cfg, stage, metric)[1]

    def ends_at(self, cfg, stage, metric):
        """The mean of its last five."""
        return float(np.mean(self.curve(cfg, stage, metric)[-5:]))


def copy_run(source, folder, without):
    """A copy that takes no room: the same files under another name, but those that will be written anew."""
    def ignore(_, names):
        pictures = ".gif", ".png", ".md"
        return [name for name in names if name.startswith((".", "eval", *without)) or name.endswith(pictures)]

    def link(a, b):
        if Path(a).suffix in (".json", ".csv"):             # a run appends to its log
            return shutil.copy2(a, b)
        try:
            os.link(a, b)
        except OSError:                                     # another disk, or a file system without links
            shutil.copy2(a, b)
        return b

    shutil.copytree(source, folder, ignore=ignore, copy_function=link)


def changed(names):
    """diwa.py with other things under some of its names, in a `with` block."""
    return mock.patch.multiple(diwa, **names) if names else contextlib.nullcontext()


def percent(truths):
    """Of some yes or no, how many yes; NaN of none."""
    truths = list(truths)
    return 100 * float(np.mean(truths)) if truths else float("nan")


def success(episodes):
    """Percent of the episodes that succeed in the simulator."""
    return percent(e["success"] for e in episodes)


def dreamed(episodes):
    """Percent of the same start states from which the policy succeeds in its dream."""
    return percent(e["dreamed_success"] for e in episodes)


# --- the verdict --------------------------------------------------------------------------------------------

def missing(exercise):
    """What is wrong with the predictions -> a sentence, or None."""
    allowed = getattr(exercise, "DIAGNOSES", None)
    for key, value in exercise.PREDICTION.items():
        if value is None:
            return "write down first what you expect, in PREDICTION"
        if allowed and value not in allowed:
            return f"PREDICTION[{key!r}] is {value!r}: choose one of {', '.join(map(repr, allowed))}"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not allowed and not (number and (value == 0 or 1 <= value <= 100)):
            return f"PREDICTION[{key!r}] is {value!r}: give 0, or a number from 1 to 100, in percent"
    return None


def compare(exercise, solution, seen):
    """The predictions beside what was seen, here and on our three seeds -> lines"""
    lines = ["", "| what | you said | here | our seeds 0, 1, 2 | |", "|---|---|---|---|---|"]
    for key, value in seen.items():
        said, ours = exercise.PREDICTION[key], solution.SEEN[key]
        if isinstance(value, str):
            right = "right" if said == value else "no"
            lines.append(f"| {key}: {exercise.WHAT[key]} | {said} | {value} | | {right} |")
            continue
        off = abs(said - value)
        if value != value:
            lines.append(f"| {key}: {exercise.WHAT[key]} | {said:.0f} % | of none | | |")
            continue
        word = "near" if off <= 10 else f"off by {off:.0f}"
        if not min(ours) - 15 <= value <= max(ours) + 15:
            word += "; and here is unlike ours, which are of --preset class"
        spread = ", ".join(f"{one:.0f}" for one in ours)
        lines.append(f"| {key}: {exercise.WHAT[key]} | {said:.0f} % | {value:.0f} % | {spread} % | {word} |")
    return [*lines, "", solution.__doc__.strip()]


def judge(path, argv=None):
    """Ask for predictions, do the experiment, compare -> exit code: 0 when it was done, 1 without a
    prediction, 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description="an experiment; see the file's first lines. "
                                     "Other flags are diwa.py's, for every variant that it trains.")
    parser.add_argument("--runs", default=str(HERE.parent / "runs"), help="where run folders are kept")
    parser.add_argument("--run", default="class", help="the run that it is about")
    parser.add_argument("--starts", type=int, default=100, help="start states a policy; 100 are +- 9 points")
    parser.add_argument("--solution", action="store_true", help="predict what solutions/ does")
    args, more = parser.parse_known_args(argv)
    exercise = load(HERE / Path(path).name)
    solution = load(HERE / "solutions" / Path(path).name)
    if args.solution:
        exercise.PREDICTION = solution.PREDICTION
    unready = missing(exercise)
    if unready and not hasattr(exercise, "DIAGNOSES"):      # a diagnosis needs its patients first
        print(f"{Path(path).name}: {unready}.")
        return 1
    try:
        seen = exercise.experiment(Lab(args.runs, args.run, args.starts, more))
    except InputError as error:
        print(f"{Path(path).name}: {error}")
        return 2
    if unready:
        print(f"\n{Path(path).name}: {unready}.")
        return 1
    print("\n".join(compare(exercise, solution, seen)))
    return 0
