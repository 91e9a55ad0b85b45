"""interactions.py: how many simulator steps does the online rival take to match DiWA?

    python -m support.interactions runs/*/online_*.json [--out figure.png]

prints one table of the rows that --stage online writes, and draws success over physical interactions.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from support import report
from support.files import InputError, write_atomic
from support.runs import changed_settings, load, load_file, output, read_log, versions

PAPER = {  # DiWA, table of simulator steps that DPPO on the world model's features takes to match it
    "open_drawer": 117_600,
    "close_drawer": 345_600,
    "move_slider_left": 270_933,
    "move_slider_right": 249_600,
    "turn_on_lightbulb": 302_933,
    "turn_off_lightbulb": 327_066,
    "turn_on_led": 494_933,
    "turn_off_led": 277_333,
}


def matches(success, target):
    """At least as good, though both are rounded means."""
    return success > target - 1e-6


ABOUT = """Practice in the simulator instead of the dream: the same PPO, from the same cloned policy, on the
features of the same world model (DPPO). It practised until, from the learning curve's start states, it was as
good as the policy tuned in the dream (which took no simulator step), or until its budget was spent. "online"
is its success from the reported start states. Both policies need recorded frames: play serves all tasks, the
demonstrations one.
"""


def write_row(cfg, target, cloned, taken, results):
    """online_<task>.json: what the table and the figure show; and online_<task>.md, the rival's report.

    target, cloned: success of the policy tuned in the dream and of the cloned one from the learning curve's
    start states; taken: simulator steps; results: {policy: success from each reported start state}"""
    steps, success = (read_log(cfg, "online", metric)[1] for metric in ("steps", "success"))
    row = dict(
        task=cfg.task,
        seed=cfg.seed,
        preset=cfg.preset,
        changed=changed_settings(cfg),
        recorded={name: len(load(cfg, name)) for name in ("play", "demos")},
        target=target,
        matched=matches(success[-1], target),
        steps=[0, *map(int, steps[:-1]), taken],            # a log has six digits: the last is exact
        curve=[cloned, *success],
        success=results,
        versions=versions(cfg),
    )
    path = output(cfg, "online").with_suffix(".json")
    write_atomic(path, lambda p: p.write_text(json.dumps(row)))
    page = path.with_suffix(".md")
    lines = [f"# {cfg.task}: the online rival", "", ABOUT, *table([row]), ""]
    write_atomic(page, lambda p: p.write_text("\n".join(lines)))
    print("\n".join(["", *lines[2:], f"report: {page}"]))


def table(rows):
    lines = [
        "| task | seed | cloned | tuned in the dream | online | simulator steps to match | paper's "
        "| recorded: for all tasks; for this one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = [report.rate(row["success"][name]) for name in ("bc", "tuned", "online")]
        steps = f"{row['steps'][-1]:,}"
        if not row["matched"]:
            steps = f"not in {steps}: {100 * max(row['curve']):.0f} % of {100 * row['target']:.0f} %"
        paper = f"{PAPER[row['task']]:,}" if row["task"] in PAPER else "-"
        recorded = f"{row['recorded']['play']:,}; {row['recorded']['demos']:,}"
        flags = report.flags_of(row)                        # none of the rows that we keep: a default's
        task = f"{row['task']} `{report.spelled(flags)}`" if flags else row["task"]
        cells = [task, str(row["seed"]), *rates, steps, paper, recorded]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def figure(path, rows):
    """Success over simulator steps: the rival's, and as a line to reach ours, which takes none."""
    from matplotlib.figure import Figure
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    picture = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    for k, row in enumerate(rows):
        axes = picture.add_subplot(lines, columns, k + 1)
        steps = np.maximum(row["steps"], 1000)              # zero has no place on a logarithmic scale
        axes.plot(steps, row["curve"], "o-", ms=3, color="tab:red", label="in simulators, online")
        axes.axhline(row["target"], color="tab:blue", label="in the dream: no step")
        for name, color in (("play", "0.6"), ("demos", "0.3")):
            axes.axvline(row["recorded"][name], color=color, ls=":", label=f"frames of {name}")
        axes.set(xscale="log", ylim=(0, 1.03), title=f"{row['task']}, seed {row['seed']}",
                 xlabel="physical interactions", ylabel="success")
        if not k:
            axes.legend(fontsize=6, loc="lower left")
    write_atomic(path, lambda p: picture.savefig(p, dpi=120))


def main(argv=None):
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m support.interactions", description=about)
    parser.add_argument("rows", nargs="+", type=Path, help="online_<task>.json of finished runs")
    parser.add_argument("--out", type=Path, help="the figure, a .png")
    given = parser.parse_args(argv)
    try:
        rows = [load_file(path) for path in given.rows]
        print("\n".join(table(rows)))
        if given.out:
            figure(given.out, rows)
    except (InputError, OSError, KeyError, TypeError) as error:
        print(f"interactions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
