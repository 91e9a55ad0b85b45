"""What does each part of the method bring?  The default and its variants, each by its flags, on the same
tasks, recordings and start states:

    python tests/ablate.py --seed 0                         # and 1, 2: one core each
    python -m support.report --ablations runs/seed?/result_*.json runs/seed?_*/result_*.json

The default's run is the README's, seed<seed>, and is made where it is not there.  A variant's run begins as a
copy of it, with links to its recordings: `--stage all` there does again what the variant's flags change.
Killed, the same command goes on; a row that is there is not made again.  Flags of diwa.py may follow, for the
default and all variants alike."""
import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["move_slider_right", "turn_off_lightbulb", "turn_on_led"]
VARIANTS = {                                                # name: flags
    "bc_gaussian": "--bc_actor gaussian",
    "bc_unet": "--bc_net unet",
    "leash_none": "--ft_bc 0",
    "leash_half": "--ft_bc .025",
    "leash_twice": "--ft_bc .1",
    "steps_1": "--ft_steps 1",
    "steps_5": "--ft_steps 5",
    "steps_20": "--ft_steps 20",
    "horizon_9": "--ft_horizon 9",
    "labels_demos": "--reward_labels demos",
    "twice": "--ft_twice 1",
    "wm_pixels": "--wm_state 0",
    "labels_state": "--reward_labels state",
    "wm_inverse": "--wm_inverse 1",
    "doubt": "--wm_heads 4 --ft_doubt 1",
    "wm_lr_constant": "--wm_lr_end 1",
    "wm_categorical": "--wm_latent categorical --wm_z 16 --wm_classes 16 --wm_kl .1",
    "wm_float32": "--wm_bf16 0",
    "iterations_72": "--ft_iterations 72",
    "last_weights": "--ft_ema 0",
    "starts_early": "--ft_starts .25",
}


def folder(seed, variant):
    return f"seed{seed}_{variant}" if variant else f"seed{seed}"


def begin(runs, seed, variant):
    """A variant's run: the default's, without its rows; recordings are links, no variant changes them."""
    source, target = runs / folder(seed, ""), runs / folder(seed, variant)
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        copy = target / path.name
        if copy.exists() or path.name.startswith((".", "result_", "report", "eval_", "online_")):
            continue
        if path.is_dir():
            copy.symlink_to(path.absolute())
        else:
            partial = copy.with_name(f".{path.name}.copy")  # renamed when whole: a kill leaves no half file
            shutil.copy2(path, partial)
            partial.replace(copy)
    add_log(source / "log.csv", target / "log.csv")


def add_log(source, target):
    """What the default's log says of tasks that the variant's does not know: they came with a later call."""
    rows = target.read_text().splitlines(keepends=True)
    known = [row.split(",")[1:2] for row in rows]
    with target.open("a") as log:
        log.writelines(row for row in source.read_text().splitlines(keepends=True)
                       if row.split(",")[1:2] not in known)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT",
                        help=f"some of: {' '.join(VARIANTS)}")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given, flags = parser.parse_known_args()                # the rest goes to diwa.py, as of every run
    for flag in ("--task", "--run", "--stage"):
        if any(word.split("=")[0] == flag for word in flags):
            parser.error(f"{flag} is set here for each row: give --tasks, --runs or --only")
    alone = dict(os.environ, OMP_NUM_THREADS="1")
    for variant, task in itertools.product(["", *given.only], given.tasks):
        run = folder(given.seed, variant)
        row = given.runs / run / f"result_{task}.json"
        if row.exists():
            print(f"{row} is there")
            continue
        if variant:
            begin(given.runs, given.seed, variant)
        command = [sys.executable, ROOT / "diwa.py", "--stage", "all", "--run", run, "--runs", given.runs,
                   "--task", task, "--seed", str(given.seed), "--workers", "1", *flags]
        if variant:                                         # the learning curve is the default's alone
            command += ["--eval_curve", "0", *VARIANTS[variant].split()]
        print(" ".join(map(str, command[1:])), flush=True)
        code = subprocess.run(command, env=alone).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
