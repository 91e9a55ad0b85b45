"""data_command.py: the commands of data.py, import and inspect."""
import argparse
import difflib
import os
import sys
from pathlib import Path

import numpy as np

from data import Dataset
from support.calvin_import import import_calvin
from support.files import InputError, write_atomic

BLOCK = "{0}.x {0}.y {0}.z {0}.roll {0}.pitch {0}.yaw"
BLOCKS = " ".join(BLOCK.format(colour) for colour in ("red", "blue", "pink"))
NAMES = {
    "rel_actions": "dx dy dz droll dpitch dyaw gripper",
    "robot_obs": "x y z roll pitch yaw width joint1 joint2 joint3 joint4 joint5 joint6 joint7 command",
    "scene_obs": f"slider drawer button switch bulb led {BLOCKS}",
}


def inspect(path, out=None):
    """Print what a dataset holds (lengths in frames, positions in m, angles in rad), and draw it.

    out: the file of the picture, contact_sheet.png."""
    ds = Dataset(path)
    lengths = ds.episodes[:, 1] - ds.episodes[:, 0] + 1
    print(f"{path}: {len(ds)} frames ({len(ds) / 1800:.1f} minutes at 30 Hz), images {ds.image_size} px, "
          f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} frames")
    print(", ".join(f"{key}: {value}" for key, value in ds.meta.items()
                    if key not in ("segments", "first_targets")))
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
    """A picture of each task's first segment from start to end, static camera over gripper camera.

    Of episodes if there are no segments."""
    from matplotlib.figure import Figure            # here, as nothing else needs it; works without a display
    spans = list({task: (task, a, b) for task, a, b in reversed(ds.segments)}.values())
    if not spans:
        spans = [(f"episode {i}", a, b) for i, (a, b) in enumerate(ds.episodes)]
    spans = sorted(spans, key=lambda span: span[1])[:rows]
    figure = Figure(figsize=(1.2 * columns, 2.7 * len(spans)), layout="constrained")
    for axis, (title, a, b) in zip(np.atleast_1d(figure.subplots(len(spans), 1)), spans):
        frames = np.linspace(a, b, columns).round().astype(int)
        strips = [np.concatenate(list(ds[key][frames]), 1) for key in ("rgb_static", "rgb_gripper")]
        axis.imshow(np.concatenate(strips))                              # [2 S, columns * S, 3]
        axis.set_title(f"{title}, frames {a} to {b}", fontsize=9)
        axis.axis("off")
    advice = "give another place for the picture: --out sheet.png"
    write_atomic(out, lambda path: figure.savefig(path, dpi=100, format="png"), advice)


def read_arguments(argv):
    """The parsed command line.

    Whatever is wrong with it is one sentence, and an unknown flag is answered with the nearest known one."""
    def refuse(message):
        raise InputError(f"{message} (see 'python data.py --help')")

    about = "Import CALVIN and inspect datasets."
    parser = argparse.ArgumentParser(prog="data.py", description=about, allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("command", choices=["import", "inspect"],
        help="convert a CALVIN split into a dataset, or print and draw what a dataset holds")
    add("folder",
        help="import: the folder with ep_start_end_ids.npy, such as task_D_D/training; inspect: a dataset")
    add("--out",
        help="import: folder of the new dataset; inspect: file of the picture (default: in the dataset)")
    add("--image-size", type=int, default=64,
        help="import: pixels along a side (default 64, the paper's)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="import: processes (default: one a core, at most 8)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--out", "--image-size", "--workers", "--help"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0)
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
