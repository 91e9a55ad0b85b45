"""report.py: what came out.  Judging a world model on recordings, intervals, pictures, report.md, and the
README's tables:

    python -m support.report docs/results/*.json

prints the results table from the rows that runs left behind (result_<task>.json), and with another word
before the rows other tables (see main).

Nothing here acts, and nothing that acts is trained here; only a probe is, to read what a feature knows.
"""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from calvin_sim import TASKS, possible
from data import window_starts
from support.files import InputError, write_atomic

PROBED = {"slider": 0, "drawer": 1, "lever": 3, "bulb": 4, "led": 5}           # name: index in scene_obs
# counts as having moved; m, m, m, 0/1, 0/1, cm
MOVED = {"slider": 0.02, "drawer": 0.02, "lever": 0.01, "bulb": 0.5, "led": 0.5, "tcp": 2.0}
# what a task asks for, m and 0/1; of the lever: half its travel
EVENT = {"slider": 0.15, "drawer": 0.12, "lever": 0.044, "bulb": 1.0, "led": 1.0}
PAPER = {  # arXiv 2508.03645, table 1 (BC, DiWA), and arXiv 2603.28955 (WAM): success in %
    "open_drawer": (57.8, 74.4, 96.7),
    "close_drawer": (59.1, 92.0, 96.6),
    "move_slider_left": (62.2, 83.3, 87.5),
    "move_slider_right": (62.6, 82.8, 89.7),
    "turn_on_lightbulb": (60.6, 91.9, 100.0),
    "turn_off_lightbulb": (35.6, 77.0, 75.9),
    "turn_on_led": (48.4, 86.2, 96.6),
    "turn_off_led": (55.3, 82.3, 100.0),
}


# --- statistics ---------------------------------------------------------------------------------------------

def wilson(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927), which also works at 0 and 1."""
    p = successes / n
    d = 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return (p + z * z / (2 * n)) / d - half, (p + z * z / (2 * n)) / d + half


def paired(before, after):
    """Two policies on the same starts -> gained, lost, the difference with its 95 % interval, and the exact
    McNemar p.

    The interval is Agresti and Min's (2005): half a pair is added to each of the four cells, so that it also
    works at the ends."""
    before = np.asarray(before, bool)
    after = np.asarray(after, bool)
    n = len(before)
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    g = gained + 0.5
    l = lost + 0.5
    m = n + 2
    half = 1.96 * math.sqrt((g + l) - (g - l) ** 2 / m) / m
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    p = min(1.0, 2 * tail / 2 ** (gained + lost))
    low = (g - l) / m - half
    high = (g - l) / m + half
    return dict(gained=gained, lost=lost, difference=(gained - lost) / n, low=low, high=high, p=p)


# --- judging a world model ----------------------------------------------------------------------------------

def fit_probe(feature, target, updates):
    """A small network that reads a state out of a feature, if it is there.

    feature [N, F], target [N, D] -> a function of features.  Linear ones read one-hot latents badly and agree
    less with what policies reach (docs/EXPERIMENTS.md, "How to read a feature")."""
    mean, std = feature.mean(0), feature.std(0) + 1e-3
    middle, spread = target.mean(0), target.std(0) + 1e-6
    layers = []
    for inputs in (feature.shape[1], 256):
        layers += [nn.Linear(inputs, 256), nn.LayerNorm(256), nn.ELU()]
    net = nn.Sequential(*layers, nn.Linear(256, target.shape[1])).to(feature.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        some = torch.randint(len(feature), (256,), device=feature.device)
        x = (feature[some] - mean) / std
        error = net(x + 0.1 * torch.randn_like(x)) - (target[some] - middle) / spread
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)
    return lambda feature: net((feature - mean) / std) * spread + middle


def probe_targets(recording, frames):
    """What a probe should read from the features of these frames: [..., 8]

    The fixtures, and the TCP position in cm."""
    tcp = 100 * recording.ds["robot_obs"][frames.ravel()][:, :3].reshape(*frames.shape, 3)
    fixtures = recording.scene[frames][..., list(PROBED.values())]
    return torch.from_numpy(np.concatenate([fixtures, tcp], -1)).to(recording.cfg.device)


def judge_world_model(recording, heldout, watch_and_dream, rng):
    """Held-out open-loop errors and the replay share, read by a probe that is fitted on training play only.

    recording: the play; heldout: demonstrations of all tasks that nothing is trained on, or None;
    watch_and_dream(recording, starts, length, last) -> posterior and dreamed features, frames.
    Without scene state only the arm can be judged.  -> tables for the report"""
    length = recording.ds.window_length()
    train_episodes, test_episodes = recording.ds.split()
    starts = rng.choice(window_starts(train_episodes, length), 300)
    seen, dreamed, frames = watch_and_dream(recording, starts, length)
    target = probe_targets(recording, frames)
    feature = torch.cat([seen, dreamed]).flatten(0, 1)
    updates = min(1500, recording.cfg.wm_updates)
    probe = fit_probe(feature, torch.cat([target, target]).flatten(0, 1).float(), updates)
    starts = rng.choice(window_starts(test_episodes, length), 400)
    _, dreamed, frames = watch_and_dream(recording, starts, length)
    truth = probe_targets(recording, frames)
    errors = open_loop_errors(probe(dreamed), truth, recording.cfg.wm_stride)
    if not recording.ds.has_scene:
        errors = [row for row in errors if row["what"] == "tcp"]
    tables = dict(open_loop=errors, replay_share={}, replay_share_watched={})
    segments = heldout.ds.segments if heldout else []
    for task in [name for name in TASKS if any(t == name for t, _, _ in segments) and heldout.has_rule(name)]:
        first, last = np.array([(a, b) for t, a, b in segments if t == task]).T
        seen, dreamed, frames = watch_and_dream(heldout, first, int((last - first).max()) + 1, last)
        column = list(PROBED.values()).index(TASKS[task].index)
        truth = probe_targets(heldout, frames)[..., column]
        for name, feature in (("replay_share", dreamed), ("replay_share_watched", seen)):
            tables[name][task] = share_of_change(probe(feature)[..., column], truth)
    print("  replay share " + "  ".join(f"{t} {s:.2f}" for t, s in tables["replay_share"].items()))
    return tables


def open_loop_errors(guess, truth, stride=1):
    """Error of a dream after 10, 40 and 72 control steps beside that of the guess that nothing moves.

    Also for the windows in which the thing moves.  Means hide missed events, so two shares stand beside them:
    of the changes as large as a task asks for, those of which the dream makes more than 60 %; and, where
    nothing changes, dreams that make such a change.
    guess, truth [W, T, 8], frames `stride` control steps apart: the fixtures of PROBED and the TCP in cm.
    -> list of rows"""
    def mean(x):
        return x.mean().item() if len(x) else float("nan")

    rows = []
    for step in (10, 40, 72):
        step = min(step // stride, truth.shape[1] - 1)
        for d, what in enumerate([*PROBED, "tcp"]):
            s = slice(5, 8) if what == "tcp" else slice(d, d + 1)
            error = (guess[:, step, s] - truth[:, step, s]).norm(dim=-1)
            still = (truth[:, 0, s] - truth[:, step, s]).norm(dim=-1)
            moved = still > MOVED[what]
            row = dict(
                step=step * stride,
                what=what,
                error=mean(error),
                still=mean(still),
                windows=int(moved.sum()),
                error_moving=mean(error[moved]),
                still_moving=mean(still[moved]),
            )
            if what != "tcp":
                change, dreamed = (x[:, step, d] - x[:, 0, d] for x in (truth, guess))
                event = still >= 0.99 * EVENT[what]
                hit = (dreamed / change > 0.6)[event]
                false = (dreamed.abs() > 0.6 * EVENT[what])[~moved]
                row.update(events=int(event.sum()), hits=mean(hit.float()), false=mean(false.float()))
            rows.append(row)
    return rows


def share_of_change(guess, truth):
    """Share of sequences [W, T] in which the guess makes more than 60 % of the true change.

    The change is that from first to last frame."""
    guessed = guess[:, -1] - guess[:, 0]
    true = truth[:, -1] - truth[:, 0]
    return (guessed / true > 0.6).float().mean().item()


@torch.no_grad()
def trust(task, success, play, heldout, watch_and_dream, rng):
    """Can the dream tell success from failure?  Recorded attempts that nothing was trained on are dreamed
    again, action by action, from their first frame.

    Held-out demonstrations (or None) that succeed within an evaluation's time; and, where a rule can tell,
    as long stretches of held-out play from where the task can be done: most of it does something else, some
    of it fails nearly, and what succeeds does so in passing.
    success(first, feature [W, T, D]) -> 1.0 or 0.0 [W, T], the classifier's, twice in a row, asked at every
    step: PPO's reward asks only at the ends of chunks, so this is the looser of the two.
    -> for both [[successes judged successes, judged failures],
                 [failures judged successes, judged failures]]"""
    length = play.ds.window_length()
    windows = []
    if play.has_rule(task):
        starts = window_starts(play.ds.split()[1], length)
        starts = starts[possible(task, play.scene[starts])]
        windows.append(("play", play, rng.choice(starts, min(200, len(starts)), replace=False), None))
    if heldout:
        first, last = np.array([(a, b) for t, a, b in heldout.ds.segments if t == task], int).reshape(-1, 2).T
        windows.append(("demonstrations", heldout, first, np.minimum(last, first + length - 1)))
    tables = dict(demonstrations=np.zeros((2, 2), int), play=np.zeros((2, 2), int))
    for name, recording, begin, end in windows:
        if len(begin):
            _, dreamed, frames = watch_and_dream(recording, begin, length, end)
            truth = recording.success(task, frames[:, :1], frames).any(1)
            # a slower demonstration is cut before it succeeds: it is no failure
            counts = truth | (name == "play")
            believed = twice(success(dreamed[:, :1].expand_as(dreamed), dreamed)).any(1).cpu().numpy()
            np.add.at(tables[name], (1 - truth[counts], 1 - believed[counts]), 1)
    return {name: table.tolist() for name, table in tables.items()}


def twice(success):
    """1.0 or 0.0 [W, T] -> bool [W, T]: success there and a step before, as diwa.dream_chunk wants it."""
    success = success > 0
    return success & F.pad(success[:, :-1], (1, 0))


def trusted(tables):
    """What trust() counted -> "15 of 16 in demonstrations, 30 of 57 in play", "3 of 143".

    Recorded successes recognised, failures believed."""
    (_, _), (fooled, right) = np.sum(list(tables.values()), 0)
    tested = [(name, hit, hit + missed) for name, ((hit, missed), _) in tables.items() if hit + missed]
    recognised = ", ".join(f"{hit} of {n} in {name}" for name, hit, n in tested) or "not tested"
    return recognised, f"{fooled} of {fooled + right}" if fooled + right else "not tested"


def precision_recall(verdict, truth):
    """-> two floats; None is one that nothing tells: no verdict of success, or no success"""
    verdict = np.asarray(verdict, bool)
    truth = np.asarray(truth, bool)
    hit = (verdict & truth).sum()
    return [float(hit / n) if n else None for n in (verdict.sum(), truth.sum())]


# --- the written report -------------------------------------------------------------------------------------

def percent(x):
    return f"{100 * x:.0f} %" if x == x else "-"


def rate(outcomes):
    low, high = wilson(sum(outcomes), len(outcomes))
    return f"{percent(np.mean(outcomes))} [{max(0, 100 * low):.0f}, {100 * high:.0f}]"


def difference(before, after, digits=0):
    d = paired(before, after)
    middle, low, high = (f"{100 * d[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"{middle} [{low}, {high}]", d


def practised_in(steps):
    """Where a policy was fine-tuned: in the dream, unless simulator steps were taken."""
    return f"in the simulator, {steps:,} steps" if steps else "in the dream only"


def success_rows(before, after, dream_before, dream, steps=0):
    """Lines of the table's own part: success before and after, difference, intervals."""
    text, d = difference(before, after)
    gap = abs(100 * (dream - np.mean(after)))
    return [
        f"| before: behaviour cloning | {rate(before)} |",
        f"| after: fine-tuned {practised_in(steps)} | {rate(after)} |",
        f"| difference, paired | {text} points, gained {d['gained']}, lost {d['lost']}, "
        f"McNemar p = {d['p']:.2g} |",
        f"| what the dream believes of the two | {percent(dream_before)} and {percent(dream)} "
        f"(the latter differs from the simulator by {gap:.0f} points) |",
    ]


def opinion(rows):
    """What the dream predicts for the cloned policy and for the tuned one, mean over the rows.

    Older rows do not know the former."""
    known = [key for key in ("dream_before", "dream") if all(key in r for r in rows)]
    return ", ".join(percent(np.mean([r[key] for r in rows])) for key in known)


def pooled_trust(rows):
    names = [name for name in rows[0].get("trust", {}) if all(name in r.get("trust", {}) for r in rows)]
    if not names:
        return "-"
    recognised, believed = trusted({name: np.sum([r["trust"][name] for r in rows], 0) for name in names})
    return f"{recognised}; {believed}"


def removed(before, after, draws=2000):
    """Share of the failures that are gone, with a 95 % interval.

    Episodes, in pairs, are drawn anew (percentile bootstrap)."""
    def share(f):
        return 1 - f[1] / np.maximum(f[0], 1)

    failures = 1 - np.stack([before, after]).astype(float)                                    # [2, N]
    draw = np.random.default_rng(0).integers(0, len(before), (draws, len(before)))
    drawn = failures[:, draw].sum(-1)                                                         # [2, draws]
    low, high = np.percentile(100 * share(drawn), (2.5, 97.5))
    return f"{percent(share(failures.sum(-1)))} [{low:.0f}, {high:.0f}]"


def published(task):
    """The papers' numbers for a task -> "BC, DiWA; WAM %", "-" for one that they do not have."""
    return "{}, {}; {} %".format(*PAPER[task]) if task in PAPER else "-"


OFFICIAL = "from CALVIN's own initial states"


def from_official(rows):
    """Success of both policies from CALVIN's own initial states, all rows together; "-" without them."""
    known = [r["official"] for r in rows if r.get("official")]
    if not known:
        return "-"
    before, after = (np.concatenate([pair[k] for pair in known]) for k in (0, 1))
    return f"{percent(np.mean(before))}, {rate(after)}"


def mean_known(shares):
    """Mean of the numbers that are known, "-" if none is: not every recording lets everything be measured."""
    known = [share for share in shares if share is not None]
    return f"{np.mean(known):.2f}" if known else "-"


def table(rows):
    """The README's results table from result rows, one line a task.

    Its seeds are pooled, each one's success in brackets; of several rows also what they say together."""
    official = any(r.get("official") for r in rows)
    lines = [
        "| task | seeds | n | cloned | fine-tuned in the dream | difference "
        + f"| {OFFICIAL} " * official +
        "| dream's opinion of the two "
        "| replay share | recorded successes recognised; failures believed | classifier: precision, recall "
        "| DiWA paper: BC, DiWA; WAM | min |",
        "|" + "---|" * (12 + official),
    ]
    tasks = tasks_in(rows)
    rows = sorted(rows, key=lambda r: (tasks.index(r["task"]), r["seed"]))
    for task in tasks:
        lines.append(task_line(task, [r for r in rows if r["task"] == task], official))
    if len(rows) > 1:
        lines += together(rows, official)
    return lines


def tasks_in(rows):
    """The papers' tasks in their order, then others."""
    known = [t for t in PAPER if any(r["task"] == t for r in rows)]
    return known + sorted({r["task"] for r in rows} - set(known))


def task_line(task, group, official):
    """The table's line of one task: `group`, its rows, one a seed."""
    before, after = (np.concatenate([r[key] for r in group]) for key in ("before", "after"))
    cloned = rate(before)
    tuned = rate(after)
    if len(group) > 1:
        cloned += seeds_own(group, "before")
        tuned += seeds_own(group, "after")
    if steps := sum(r.get("simulator_steps", 0) for r in group):
        tuned += f" ({practised_in(steps)})"
    cells = [
        task,
        ", ".join(str(r["seed"]) for r in group),
        str(len(before)),
        cloned,
        tuned,
        difference(before, after)[0],
        *[from_official(group)] * official,
        opinion(group),
        mean_known([r["replay_share"].get(task) for r in group]),
        pooled_trust(group),
        mean_classifier(group),
        published(task),
        f"{np.mean([minutes_of(r) for r in group]):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def mean_classifier(rows):
    """The classifier's precision and recall, means over the rows that know them."""
    known = [r["classifier"] for r in rows if "classifier" in r]
    return ", ".join(map(mean_known, zip(*known))) or "-"


def seeds_own(group, key):
    """Each seed's own success, in brackets."""
    return " (" + ", ".join(f"{100 * np.mean(r[key]):.0f}" for r in group) + ")"


def seeds_differences(rows):
    """Each seed's own mean difference, in brackets.

    It has its own play and world model; intervals count episodes and know nothing of that."""
    seeds = sorted({r["seed"] for r in rows})
    if len(seeds) == 1:
        return ""
    own = []
    for seed in seeds:
        gained = [np.mean(r["after"]) - np.mean(r["before"]) for r in rows if r["seed"] == seed]
        own.append(f"{100 * np.mean(gained):+.0f}")
    return f" (seeds {', '.join(own)})"


def together(rows, official):
    """The table's last line, and a sentence below it: what several rows say together."""
    before, after, dream = (np.array([np.mean(r[k]) for r in rows]) for k in ("before", "after", "dream"))
    pairs = [np.concatenate([r[key] for r in rows]) for key in ("before", "after")]
    share = mean_known([share for r in rows for share in r["replay_share"].values()])
    judged = max(len(r["replay_share"]) for r in rows)
    gap = 100 * np.abs(dream - after).mean()
    sentence = (f"Fine-tuning removed {removed(*pairs)} of what cloning fails "
                "(paper: DiWA 64 %, WAM about 80 %); "
                f"dream and simulator differ by {gap:.0f} points on average")
    prices = [max(r["curve"].values()) - list(r["curve"].values())[-1] for r in rows if r["curve"]]
    if prices:
        sentence += (f"; the best checkpoint in hindsight seems {100 * np.mean(prices):.1f} points better "
                     "than the last one, on the learning curve's starts (too many: a maximum picks luck)")
    mean_line = (f"| mean of {len(rows)} | | | {percent(before.mean())} | {percent(after.mean())} "
                 f"| {difference(*pairs)[0]}{seeds_differences(rows)} "
                 + f"| {from_official(rows)} " * official +
                 f"| {opinion(rows)} | {share} ({'all eight' if judged == 8 else f'all {judged}'}) "
                 f"| {pooled_trust(rows)} | | | |")
    return [mean_line, "", sentence + "."]


def short_table(rows):
    """The README's table: task, cloned and fine-tuned success with intervals, and what the papers have."""
    official = any(r.get("official") for r in rows)
    column = f" {OFFICIAL}, cloned and fine-tuned |" if official else ""
    lines = [f"| task | cloned | fine-tuned in the dream |{column} DiWA | WAM |"]
    lines += ["|---" * (5 + official) + "|"]
    tasks = tasks_in(rows)
    for task in tasks:
        group = [r for r in rows if r["task"] == task]
        before, after = (np.concatenate([r[key] for r in group]) for key in ("before", "after"))
        column = f" {from_official(group)} |" if official else ""
        papers = " | ".join(f"{number} %" for number in PAPER[task][1:]) if task in PAPER else "- | -"
        lines.append(f"| {task} | {rate(before)} | {rate(after)} |{column} {papers} |")
    before, after = (np.mean([np.mean(r[key]) for r in rows]) for key in ("before", "after"))
    pairs = [np.concatenate([r[key] for r in rows]) for key in ("before", "after")]
    known = [PAPER[task][1:] for task in tasks if task in PAPER]
    papers = " | ".join(f"{number:.1f} %" for number in np.mean(known, 0)) if known else "- | -"
    tuned = f"**{percent(after)}**, difference {difference(*pairs)[0]}{seeds_differences(rows)}"
    column = f" {from_official(rows)} |" if official else ""
    lines.append(f"| mean | {percent(before)} | {tuned} |{column} {papers} |")
    return lines


def compact_table(rows):
    """The same in four lines: success in %, a column a task."""
    tasks = tasks_in(rows)
    names = [t.replace("_", " ").replace("move ", "") for t in tasks]
    names = [re.sub("turn (on|off) (.*)", r"\2 \1", name) for name in names]
    lines = ["| % | " + " | ".join(names) + " | mean |"]
    lines += ["|---" * (len(tasks) + 2) + "|"]
    for name, key in (("cloned", "before"), ("fine-tuned", "after")):
        rates = [100 * np.mean([np.mean(r[key]) for r in rows if r["task"] == task]) for task in tasks]
        mean = 100 * np.mean([np.mean(r[key]) for r in rows])
        lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + f" | **{mean:.0f}** |")
    return lines


def minutes_of(row):
    """From nothing to the row.  Older rows also name what a rival took that practised in the same folder."""
    return sum(minutes for stage, minutes in row["minutes"].items() if stage != "online")


def flags_of(row):
    """The settings that a row's command names -> ((name, value), ...), or None of an older row"""
    if "changed" not in row:
        return None
    source = dict(preset=row["preset"], sim=row["versions"].get("sim", "tabletop"))
    named = {name: value for name, value in source.items() if value not in ("cpu", "tabletop")}
    return tuple((named | row["changed"]).items())


def spelled(flags):
    return " ".join(f"--{name} {value}" for name, value in flags)


def check_once(rows):
    """Rows that are pooled are of one policy each, or n would count some start states twice."""
    seen = set()
    for row in rows:
        place = row["task"], row["seed"]
        if place in seen:
            raise InputError(f"two rows of {place[0]}, seed {place[1]}, with the same settings, or of older "
                             "versions: give one of them, a table pools seeds")
        seen.add(place)


def check_alike(rows):
    """A table is of one recipe; older rows don't say how they were made."""
    known = sorted({spelled(flags) for flags in map(flags_of, rows) if flags is not None})
    if len(known) > 1:
        raise InputError(f"these rows are of different settings, such as '{known[0]}' and '{known[1]}': "
                         "give those of one, or give --ablations first, which keeps them apart")
    check_once(rows)


def ablations(rows):
    """What a changed setting does: a line a variant, beside the default from the same start states.

    The default is what has the flags that all rows have, and no others."""
    for row in rows:
        if "changed" not in row:
            raise InputError(f"the row of {row['task']}, seed {row['seed']}, is of an older version and does "
                             "not say which settings it changed: make it anew with --stage report")
    variants = {}
    for row in rows:
        variants.setdefault(flags_of(row), []).append(row)
    for group in variants.values():
        check_once(group)
    common = set.intersection(*map(set, variants))
    base = next((flags for flags in variants if set(flags) == common), None)
    default = {(r["task"], r["seed"]): r["after"] for r in variants.get(base, ())}
    lines = ["| changed | rows | n | cloned | fine-tuned | difference from the default's, same start states "
             "| dream minus simulator, points | min |", "|---" * 8 + "|"]
    for flags in sorted(variants, key=lambda flags: (flags != base, spelled(flags))):
        group = variants[flags]
        cloned, tuned = (np.concatenate([r[key] for r in group]) for key in ("before", "after"))
        others = group if flags != base else []
        beside = [(default.get((r["task"], r["seed"])), r["after"]) for r in others]
        beside = [(a, b) for a, b in beside if a]
        if any(len(a) != len(b) for a, b in beside):
            raise InputError(f"rows of {spelled(flags)} have other start states than the default's: "
                             "give both the same --eval_episodes")
        cells = [
            f"`{spelled(flags)}`" if flags else "nothing",
            str(len(group)),
            str(len(cloned)),
            rate(cloned),
            rate(tuned),
            difference(*map(np.concatenate, zip(*beside)), digits=1)[0] if beside else "-",
            f"{100 * np.mean([r['dream'] - np.mean(r['after']) for r in group]):+.0f}",
            f"{np.mean([minutes_of(r) for r in group]):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def beside(rows):
    """What changed code, or a changed default, does: two rows of each task and seed, whatever flags each had.

    The one given first is what was.  The start states must be the same; that is not checked, but for their
    number and simulator."""
    rows_of = {}
    for row in rows:
        rows_of.setdefault((row["task"], row["seed"]), []).append(row)
    for (task, seed), pair in rows_of.items():
        exams = {(len(row["after"]), row["versions"].get("sim")) for row in pair}
        if len(pair) != 2 or len(exams) != 1 or pair[0] == pair[1]:
            raise InputError(f"{task}, seed {seed}: give two rows of the same --sim and --eval_episodes for "
                             "each task and seed, first those that were, then those that are")
    lines = ["| task | seeds | n | cloned, was and is | fine-tuned, was and is "
             "| difference of the fine-tuned | dream and simulator apart, points "
             "| classifier: precision, recall |", "|---" * 8 + "|"]
    for task in [*tasks_in(rows), "all"]:
        pairs = [pair for (name, _), pair in rows_of.items() if task in (name, "all")]
        sides = list(zip(*pairs))                           # rows that were, rows that are
        cloned, tuned = ([np.concatenate([row[key] for row in side]) for side in sides]
                         for key in ("before", "after"))
        gaps = [np.mean([abs(row["dream"] - np.mean(row["after"])) for row in side]) for side in sides]
        cells = [
            task,
            ", ".join(str(seed) for seed in sorted({row["seed"] for row in sides[0]})),
            str(len(tuned[0])),
            ", ".join(f"{100 * np.mean(side):.1f} %" for side in cloned),
            ", ".join(f"{100 * np.mean(side):.1f} %" for side in tuned),
            difference(*tuned, digits=1)[0],
            ", ".join(f"{100 * gap:.1f}" for gap in gaps),
            "; ".join(map(mean_classifier, sides)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write(folder, task, settings, changed, versions, evaluation, judged, minutes, ends):
    """runs/<name>/report.md.

    changed: settings that are not the preset's; evaluation: content of eval_<task>.json;
    judged: the world model's own tables; minutes: {stage: minutes};
    ends: {"stage.metric": where it ended}."""
    simulated = settings["sim"] != "none"
    rows = evaluation["results"]
    before, after = ([r["success"] for r in rows[p]] for p in ("bc", "tuned"))
    dream_before = float(np.mean([r["dreamed_success"] for r in rows["bc"]] if simulated else before))
    steps = evaluation.get("simulator_steps", 0)
    opinion_line = success_rows(before, after, dream_before, evaluation["dream_success"], steps)
    official, also = [], []
    if evaluation.get("official"):
        official = [[int(e["success"]) for e in evaluation["official"][p]] for p in ("bc", "tuned")]
        also = [f"| {OFFICIAL}, {len(official[0])} | {from_official([dict(official=official)])} |"]
    where = "simulator" if simulated else "dream (no simulator was given)"
    labels = settings["reward_labels"]
    lines = [
        f"# {task}: practised in {'the simulator' if steps else 'a dream'}",
        "",
        exam(settings, evaluation, len(before)),
        "",
        f"| success in the {where} | this run |",
        "|---|---|",
        *opinion_line[:4 if simulated else 3],
        f"| the papers' row, real CALVIN (BC, DiWA; WAM) | {published(task)} |",
        *also,
        "",
        f"{f'{steps:,} simulator steps were' if steps else 'No simulator step was'} used between the "
        f"recorded data and the fine-tuned policy. Reward labels: {labels}.",
        "",
        f"![learning curve](curves_{task}.png)",
        "",
        f"![dream](dream_{task}.gif)",
    ]
    if simulated:
        lines[-1] += f" ![before](rollout_before_{task}.gif) ![after](rollout_after_{task}.gif)"
        lines += classifier_lines(rows)
    lines += trust_lines(task, judged) + world_model_lines(judged) + health_lines(ends)
    lines += ["", f"![the course of training](health_{task}.png)"]
    lines += [
        "",
        "## Minutes",
        "",
        "| " + " | ".join(minutes) + " | all |",
        "|" + "---|" * (len(minutes) + 1),
        "| " + " | ".join(f"{m:.1f}" for m in minutes.values()) + f" | {sum(minutes.values()):.1f} |",
        "",
        "Made with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
        + "".join(f" --{k} {v}" for k, v in changed.items()),
    ]
    row = dict(
        task=task,
        seed=settings["seed"],
        preset=settings["preset"],
        before=[int(x) for x in before],
        after=[int(x) for x in after],
        dream_before=dream_before,
        dream=evaluation["dream_success"],
        curve=evaluation["curve"],
        replay_share=judged["replay_share"],
        labels=labels,
        minutes=minutes,
        changed=changed,
        versions=versions,
        trust=judged["trust"],
        simulator_steps=steps,
        ends=ends,
        official=official,
    )
    if simulated:
        real, truth = ([v for r in rows["tuned"] for v in r[key]] for key in ("real", "truth"))
        row["classifier"] = precision_recall(real, truth)
    write_atomic(folder / f"result_{task}.json", lambda p: p.write_text(json.dumps(row, indent=1)))
    for name in (f"report_{task}.md", "report.md"):
        write_atomic(folder / name, lambda p: p.write_text("\n".join(lines) + "\n"))
    return lines


def exam(settings, evaluation, n):
    """What was asked of the two policies, in a sentence that is true of this run."""
    steps = settings["eval_steps"]
    ending = f"95 % intervals. Seed {settings['seed']}, preset {settings['preset']}."
    if settings["sim"] != "none":
        return (f"{n} start states, the same before and after; at most {steps} steps; CALVIN's task rule; "
                f"{ending}")
    source = "of demonstrations that nothing was trained on"
    if evaluation.get("trained_on"):
        source = ("of demonstrations that the policy was cloned from or the world model trained on, "
                  "for want of others")
    return (f"{n} recorded first frames, {source}, each dreamed once by both policies; "
            f"at most {steps} steps; "
            f"success is what the classifier believes, which nobody has checked; {ending}")


def classifier_lines(results):
    """report.md: the classifier on the evaluation's episodes.  results: {policy: episodes}"""
    lines = [
        "",
        "## The success classifier on held-out policy rollouts",
        "",
        "Every chunk end of the evaluation episodes, failures included; "
        "the same actions replayed in the dream from the first frame.",
        "",
        "| rollouts of | seen | precision | recall | failed episodes in which it fires |",
        "|---|---|---|---|---|",
    ]
    for policy in ("bc", "tuned"):
        rows = results[policy]
        truth = [t for r in rows for t in r["truth"]]
        failed = [r for r in rows if not r["success"]]
        for where, name in (("real", "real frames"), ("dream", "dream")):
            precision, recall = precision_recall([v for r in rows for v in r[where]], truth)
            fired = f"{sum(any(r[where]) for r in failed)} of {len(failed)}"
            known = f"{mean_known([precision])} | {mean_known([recall])}"
            lines.append(f"| {policy} | {name} | {known} | {fired} |")
    lines += ["", "On real frames one verdict counts, in the dream two steps in a row, as in the reward."]
    return lines


def trust_lines(task, judged):
    """report.md: recorded attempts, dreamed again."""
    source = "that nothing was trained on"
    if task in judged["trained_on"]:
        source = "(some of which were trained on, for want of others)"
    play = ", and stretches of held-out play from where the task can be done"
    if not np.sum(judged["trust"]["play"]):
        play = "; no stretch of play could be judged"
    lines = [
        "",
        "## Can the dream tell success from failure?",
        "",
        f"Recorded attempts, dreamed again action by action: demonstrations {source}{play}.",
        "",
        "| recorded | dreamed: success | dreamed: failure |",
        "|---|---|---|",
    ]
    for name, counts in judged["trust"].items():
        for truth, (yes, no) in zip(("success", "failure"), counts):
            if yes + no:
                lines.append(f"| {truth} in {name} | {yes} | {no} |")
    return lines


def world_model_lines(judged):
    """report.md: the world model's own measures, those that this recording allows."""
    lines = ["", "## The world model on recordings it has not seen", ""]
    shares = judged["replay_share"]
    if shares:
        trained_on = ""
        if seen := [task for task in shares if task in judged["trained_on"]]:
            trained_on = f"  Trained on, for want of others: {', '.join(seen)}."
        lines += [
            "Replay share: a held-out demonstration's actions, replayed in the dream from its first frame; "
            "in what share does the task's object make more",
            f"than 60 % of its true change?  (A small network reads the feature.){trained_on}",
            "",
            "| task | " + " | ".join(shares) + " | mean |",
            "|---|" + "---|" * (len(shares) + 1),
        ]
        for name, key in (("dreamed", "replay_share"), ("watched", "replay_share_watched")):
            row = list(judged[key].values())
            numbers = " | ".join(f"{x:.2f}" for x in row)
            lines.append(f"| {name} | {numbers} | {np.mean(row):.2f} |")
    else:
        lines.append("Replay share: not measured, for it needs the scene state of held-out demonstrations.")
    lines += [
        "",
        'Open-loop error from one frame (m, tcp in cm, lights 0..1), against "nothing moves":',
        "",
        "| what | steps | error | nothing moves | where it moves: windows | error | nothing moves "
        "| as much as a task asks: windows | dreamed | false alarms |",
        "|" + "---|" * 10,
    ]
    for r in judged["open_loop"]:
        events = "| | |"
        if "events" in r:
            events = f"{r['events']} | {percent(r['hits'])} | {percent(r['false'])} |"
        lines.append(f"| {r['what']} | {r['step']} | {r['error']:.3f} | {r['still']:.3f} | {r['windows']} "
                     f"| {r['error_moving']:.3f} | {r['still_moving']:.3f} | {events}")
    return lines


# --- was training healthy? ----------------------------------------------------------------------------------

HEALTHY = {  # (stage, metric): a little wider than where the runs in docs/results end; what it is
    ("wm", "image"): (50, 125, "half the squared error of watched frames, summed over their codes"),
    ("wm", "open_image"): (60, 135, "the same of dreamed frames; far above image: the dream drifts"),
    ("wm", "kl"): (10, 70, "nats that a frame tells beyond the prior; near 0: the latent is not used"),
    ("wm", "norm"): (80, 300, "gradient norm before clipping; rising: lower --wm_lr"),
    ("bc", "loss"): (0.03, 0.07, "denoising error; near 1: nothing learned, near 0: demonstrations by heart"),
    ("reward", "contrast"): (4.8, 5.5, "NT-Xent; log of the batch at the start"),
    ("reward", "entropy"): (0, 0.06, "cross-entropy; .69: nothing learned, near 0: pairs by heart"),
    ("finetune", "anchor"): (-0.23, -0.215, "minus log-likelihood of cloned chains; rising: it drifts off"),
    ("finetune", "kl"): (2.5e-5, 5e-5, "change of the policy in one iteration; a jump: lower --ft_actor_lr"),
    ("finetune", "clipped"): (0.08, 0.16, "share of clipped ratios; 0: it hardly learns, 1: too long steps"),
    ("finetune", "explained"): (0.5, 0.9, "share of the returns' variance that the critic foresees"),
}


# With other settings than these a term means something else, and its range says nothing
# convolutions count every pixel, codes what their components span
OF_CODES = dict(wm_encoder="linear", wm_gripper=0.25, wm_codes=256, image_size=64)
MEANT_WITH = {
    ("wm", "image"): OF_CODES,
    ("wm", "open_image"): OF_CODES,
    ("wm", "norm"): OF_CODES,
    ("bc", "loss"): dict(bc_actor="diffusion"),
    ("finetune", "anchor"): dict(bc_actor="diffusion", bc_steps=20, ft_steps=10, ft_std=0.1, ft_bc=0.05),
}


def healthy_terms(settings):
    """The terms whose range holds with these settings, {name: value} -> [(stage, metric)]"""
    def holds(term):
        wanted = MEANT_WITH.get(term, {})
        return all(settings.get(name, value) == value for name, value in wanted.items())

    return [term for term in HEALTHY if holds(term)]


def end_of(values):
    """Where a curve ends: the mean of its last tenth."""
    return float(np.mean(values[-max(1, len(values) // 10):]))


def health_lines(ends):
    """report.md: where each term of training ended, beside where it ends in runs that went well.

    ends: {"stage.metric": value}"""
    lines = ["", "## Was training healthy?", "", "Healthy is where runs at the default settings end.", ""]
    lines += ["| stage | term | ends at | healthy | |", "|---|---|---|---|---|"]
    for (stage, metric), (low, high, meaning) in HEALTHY.items():
        value = ends.get(f"{stage}.{metric}")
        if value is not None:
            warning = "" if low <= value <= high else "**outside**: "
            lines.append(f"| {stage} | {metric} | {value:.3g} | {low:g} to {high:g} | {warning}{meaning} |")
    return lines


def ranges(rows):
    """The table of healthy ranges, from result rows: lowest and highest end of each term."""
    lines = ["| stage | term | ends at | what it is |", "|---|---|---|---|"]
    for (stage, metric), (_, _, meaning) in HEALTHY.items():
        values = [r["ends"][f"{stage}.{metric}"] for r in rows if f"{stage}.{metric}" in r.get("ends", {})]
        if values:
            lines.append(f"| {stage} | {metric} | {min(values):.3g} to {max(values):.3g} | {meaning} |")
    return lines


def health(path, task, logs):
    """A panel a term: its course in this run, and the band in which it ends in runs that went well.

    logs: {(stage, metric): (steps, values)}"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 4, figsize=(13, 8), gridspec_kw=dict(hspace=0.35, wspace=0.25))
    for axis in axes.flat[len(logs):]:
        axis.axis("off")
    for axis, ((stage, metric), (steps, values)) in zip(axes.flat, logs.items()):
        low, high, _ = HEALTHY[stage, metric]
        axis.axhspan(low, high, color="tab:green", alpha=0.2)
        axis.plot(steps, values, color="tab:blue", lw=1)
        ends = [low, high, *values[len(values) // 20:]]     # the first steps may be off the scale
        room = 0.1 * (max(ends) - min(ends) or 1)
        axis.set_ylim(min(ends) - room, max(ends) + room)
        axis.set_title(f"{stage}: {metric}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{task}: green is where the terms end in runs that went well", fontsize=10)
    write_atomic(path, lambda p: figure.savefig(p, dpi=90))
    plt.close(figure)


def curves(path, task, dream_log, evaluation, n_curve, trust, simulated):
    """Success over the iterations of fine-tuning: in the dream, exploring, from where practice starts, and in
    the simulator, as a robot acts, from other starts.  They should rise together.

    Below: may the dream be believed?"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curve = evaluation["curve"]
    before, after = ([r["success"] for r in evaluation["results"][p]] for p in ("bc", "tuned"))
    figure, axis = plt.subplots(figsize=(7, 4))
    online = evaluation.get("simulator_steps", 0)
    label = f"practice, {practised_in(online)}" if online else "dream (exploring, its own reward)"
    axis.plot(*dream_log, color="tab:blue", label=label)
    steps = [int(k) for k in curve]
    rates = np.array(list(curve.values()))
    low, high = np.array([wilson(r * n_curve, n_curve) for r in rates]).reshape(-1, 2).T
    if curve:
        bars = [np.maximum(rates - low, 0), np.maximum(high - rates, 0)]
        label = f"simulator ({n_curve} other starts)"
        axis.errorbar(steps, rates, bars, color="tab:orange", marker="o", capsize=3, label=label)
    label = f"cloned, {len(before)} test starts: {percent(np.mean(before))}"
    axis.axhline(np.mean(before), color="gray", ls=":", label=label)
    label = f"fine-tuned, same starts: {percent(np.mean(after))}"
    axis.axhline(np.mean(after), color="black", ls="--", label=label)
    recognised, believed = trusted(trust)
    axis.set(ylabel="success" if simulated else "success believed in the dream", ylim=(0, 1.05), title=task)
    axis.set_xlabel(
        f"PPO iteration {practised_in(online)}\n"
        f"(recorded attempts, dreamed again: successes recognised {recognised};\n"
        f"failures believed {believed})",
        fontsize=8,
    )
    axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    write_atomic(path, lambda p: figure.savefig(p, dpi=110))
    plt.close(figure)


def gif(path, frames, scale=3, stride=1):
    """frames: list of [H, W, 3] u8, stride control steps apart."""
    import imageio
    large = [np.kron(f, np.ones((scale, scale, 1), np.uint8)) for f in frames]
    write_atomic(path, lambda p: imageio.mimsave(p, large, duration=40 * stride, loop=0))


def dream_strip(truth, watched, dreamed, scores):
    """One gif frame a step: truth, what the model sees when it watches, what it dreams.

    Below them a bar with the classifier's score.

    truth, watched, dreamed: (static, gripper) [T, S, S, 3] u8; scores [T] in 0..1."""
    frames = []
    for t, score in enumerate(scores):
        columns = [np.concatenate([x[0][t], x[1][t]], 0) for x in (truth, watched, dreamed)]
        picture = np.concatenate(columns, 1)
        bar = np.zeros((6, picture.shape[1], 3), np.uint8)
        bar[:, :int(score * picture.shape[1])] = (60, 200, 90) if score > 0.5 else (200, 140, 60)
        frames.append(np.concatenate([picture, bar], 0))
    return frames


def main(paths):
    """Print the table of the given result rows -> the exit code.

    After --short and --compact the README's; after --ranges where the terms of their trainings ended; after
    --ablations what changed settings do, after --beside what changed code does."""
    try:
        kinds = {"--short": short_table, "--compact": compact_table, "--ranges": ranges,
                 "--ablations": ablations, "--beside": beside}
        kind = paths[:1][0] if paths and paths[0] in kinds else None
        paths = paths[1:] if kind else paths
        if not paths:
            raise InputError("give the rows of some runs: python -m support.report runs/*/result_*.json")
        rows = [read_row(Path(path)) for path in paths]
        if kind not in ("--ranges", "--ablations", "--beside"):
            check_alike(rows)
        print("\n".join(kinds.get(kind, table)(rows)))
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def read_row(path):
    """A result_<task>.json, checked as far as the table needs it."""
    try:
        row = json.loads(path.read_text())
        table([row])
        return row
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give the rows of some runs, runs/*/result_*.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is no row of a run ({what}): give runs/*/result_*.json") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
