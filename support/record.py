"""record.py: the two stages that record, play and demonstrations, or cut them out of somebody's recording."""
import json
import shutil
from pathlib import Path

import numpy as np

from data import FIELDS, HELD_OUT, Dataset, commanded_targets, frame_bytes, pack, save_part
from support import expert
from support.files import InputError, free_space, replace_folder, write_atomic, writing
from support.runs import (DEMO_FRAMES, RENDERERS, apart, check_data, code, first_seed, in_processes, load,
                          load_file, make_sim, origin, output, play_tasks, sim_of, versions)


def stage_play(cfg):
    """Task-agnostic play for the world model, and demonstrations of the same tasks, which only ever judge."""
    folder = output(cfg, "play")
    if cfg.data:
        return use_given_play(cfg, folder)
    parts = folder.with_name("play.parts")
    episodes = max(10, cfg.play_frames // cfg.play_episode)
    wanted = {"play": (first_seed(cfg, "play"), episodes, cfg.play_episode)}
    tasks = play_tasks(cfg)
    for task in tasks:
        wanted[task] = first_seed(cfg, "heldout", task), cfg.play_replay, 0
    good = record(cfg, parts, wanted)
    replay = folder.with_name("replay")
    shutil.rmtree(replay, ignore_errors=True)               # an earlier play's would judge this one
    if cfg.play_replay:
        pack_recorded(cfg, "play", replay, {task: good[task] for task in tasks})
    pack_recorded(cfg, "play", folder, {"play": good["play"]})
    shutil.rmtree(parts)


def stage_demos(cfg):
    """Demonstrations of the task by the scripted expert."""
    folder = output(cfg, "demos")
    if cfg.data:
        return use_given_demos(cfg, folder)
    parts = folder.with_name(folder.name + ".parts")
    good = record(cfg, parts, {cfg.task: (first_seed(cfg, "demos", cfg.task), cfg.demo_count, 0)})
    pack_recorded(cfg, "demos", folder, good)
    shutil.rmtree(parts)


def record_episode(sim, job):
    """An episode of play, or a demonstration, to a file."""
    if job["kind"] == "play":
        episode = expert.play_episode(sim, job["seed"], job["length"], job["tasks"])
        solved = True
    else:
        episode, solved = expert.demo_episode(sim, job["kind"], job["seed"])
    save_part(Path(job["path"]), dict(episode, solved=np.array(solved)))


def record_job(job):
    """One simulator process records one episode to a file, unless it is there already."""
    path = Path(job["path"])
    if not path.exists():
        # one simulator a process
        sim = record_job.__dict__.setdefault("sim", None) or make_sim(**job["sim"])
        record_job.sim = sim
        apart(job["sim"]["sim"], record_episode, sim, job)
    with np.load(path) as part:
        return bool(part["solved"]), len(part["rel_actions"])


def record(cfg, parts, wanted):
    """Record wanted = {kind: (first seed, number of episodes, their length)}.

    Episodes that the expert fails are replaced by the next seed's.
    -> {kind: [(file, frames)]}, the same whatever the number of processes and however often it was
    interrupted"""
    drop_others(cfg, parts, wanted)
    frames = sum(count * (length or DEMO_FRAMES) for _, count, length in wanted.values())
    announce_space(cfg, parts, frames, "play_frames" if "play" in wanted else "demo_count")
    good = {kind: [] for kind in wanted}
    tried = dict.fromkeys(wanted, 0)
    while any(len(good[kind]) < wanted[kind][1] for kind in wanted):
        jobs = []
        for kind, (first, count, length) in wanted.items():
            missing = count - len(good[kind])
            for seed in range(first + tried[kind], first + tried[kind] + missing):
                path = str(parts / f"{kind}_{seed}.npz")
                jobs.append(dict(path=path, kind=kind, seed=seed, length=length, sim=sim_of(cfg),
                                 tasks=play_tasks(cfg)))
            if tried[kind] + missing > 3 * count + 20:
                raise InputError(f"the scripted expert solved only {len(good[kind])} of {tried[kind]} starts "
                                 f"of {kind}: see 'python calvin_sim.py check'")
            tried[kind] += missing
        done = sum(Path(job["path"]).exists() for job in jobs)
        for job, (solved, frames) in zip(jobs, in_processes(cfg, record_job, jobs, "episodes", done)):
            if solved:
                good[job["kind"]].append((job["path"], frames))
    return good


def drop_others(cfg, parts, wanted):
    """Make the folder of the parts; what lies there from a recording with other settings is deleted.

    A part is known by its name: without this a recording that was cut off would go on with any settings."""
    lengths = {kind: length for kind, (_, _, length) in wanted.items()}
    stage = "play" if "play" in wanted else "demos"
    made_with = dict(sim=cfg.sim, image_size=cfg.image_size, seed=cfg.seed, lengths=lengths,
                     code=code(cfg, stage))
    note = parts / "made_with.json"
    with writing(parts):
        if parts.exists() and (not note.exists() or load_file(note) != made_with):
            print(f"  {parts} is of a recording with other settings or code: it begins anew")
            shutil.rmtree(parts)
        parts.mkdir(parents=True, exist_ok=True)
        write_atomic(note, lambda p: p.write_text(json.dumps(made_with)))


def announce_space(cfg, parts, frames, flag):
    """Say what a recording takes on the disk before it begins, and refuse when that is too small."""
    keeps = frames * frame_bytes(cfg.image_size)
    there = sum(p.stat().st_size for p in parts.glob("*.npz"))          # of a recording that was cut off
    free = free_space(parts)
    print(f"  about {frames:,} frames: {keeps / 1e9:.2f} GB to keep, twice that until they are packed "
          f"({free / 1e9:.1f} GB are free)")
    if free + there < 2 * keeps:
        raise InputError(f"{parts.parent} needs {2 * keeps / 1e9:.2f} GB of disk space and "
                         f"{(free + there) / 1e9:.2f} GB are free: "
                         f"free some, choose another --runs folder, or record less (--{flag})")


def pack_recorded(cfg, stage, folder, good):
    """Pack what record() returned; every episode but play's is a segment of its task."""
    meta = dict(
        source="calvin_env" if cfg.sim == "calvin" else "built-in tabletop",
        **origin(cfg, stage),
        seed=cfg.seed,
        renderer=RENDERERS[cfg.sim],
        versions=versions(cfg),
    )
    segments = [(kind, 0, n - 1) for kind in good if kind != "play" for _, n in good[kind]]
    pack([path for kind in good for path, _ in good[kind]], folder, meta, segments or None)


# --- somebody else's recording: --data ----------------------------------------------------------------------

def cut_episodes(episodes, length):
    """Cut long episodes [E, 2] into even pieces of at most `length` frames.

    So whole ones can be held out, even if the recording is a single one."""
    cut = []
    for a, b in episodes:
        number = -(-(b - a + 1) // length)                  # rounded up
        cut += [(piece[0], piece[-1]) for piece in np.array_split(np.arange(a, b + 1), number)]
    return np.array(cut, np.int64)


def cut_recording(cfg, given):
    """Pieces of a recording -> episodes [E, 2]

    They are --play_episode long or, of a small recording, so short that one of ten can be held out."""
    def pieces(window):                                     # the longest that leave enough of them, if any do
        for length in range(cfg.play_episode, window - 1, -1):
            episodes = cut_episodes(given.episodes, length)
            long_enough = episodes[:, 1] - episodes[:, 0] + 1 >= window
            trained_on = np.arange(len(episodes)) % HELD_OUT < HELD_OUT - 1
            if len(episodes) >= HELD_OUT and long_enough[trained_on].any():
                return episodes

    for wm_length in range(cfg.wm_length, 1, -1):
        episodes = pieces((wm_length - 1) * cfg.wm_stride + 1)
        if episodes is None:
            continue
        if wm_length == cfg.wm_length:
            return episodes
        raise InputError(f"{cfg.data} has {len(given)} frames, too few for ten pieces as long as "
                         f"--wm_length {cfg.wm_length} asks for (one of them is held out): "
                         f"give --wm_length {wm_length}, or record more")
    raise InputError(f"{cfg.data} has {len(given)} frames in {len(given.episodes)} episodes, "
                     "too few to train on and to hold out: record more")


def held_out(segments, play):
    """Which of the segments lie in episodes of the play that the world model is not trained on?

    -> list of bool"""
    _, unseen = play.split()
    return [any(a <= first and last <= b for a, b in unseen) for _, first, last in segments]


def divided(task, segments, play):
    """The segments of a task in a recording that is play, too -> those to clone, those that judge, and
    whether some do both, for want of others.

    One that only reaches into a held-out episode does neither: what judges there would have been cloned."""
    mine = [s for s in segments if s[0] == task and s[2] - s[1] >= SHORTEST]
    judge = [s for s, unseen in zip(mine, held_out(mine, play)) if unseen]
    _, pieces = play.split()
    clone = [s for s in mine if not any(a <= s[2] and s[1] <= b for a, b in pieces)]
    return clone or mine, judge or mine, not (clone and judge)


def use_given_play(cfg, folder):
    """The dataset of --data as play: an index into its frames.

    And what was held out of it as the demonstrations that judge."""
    given = check_data(cfg)
    episodes = cut_recording(cfg, given)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder):
        temporary.mkdir(parents=True)
        np.save(temporary / "ep_start_end_ids.npy", episodes)
        meta = dict(given.meta, frames_in=str(given.path.absolute()),
                    first_targets=targets_at(given, episodes[:, 0]), **origin(cfg, "play"))
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    heldout = []
    seen_before = []
    for task in dict.fromkeys(task for task, _, _ in given.segments):
        _, judge, both = divided(task, given.segments, Dataset(temporary))
        if both:
            print(f"warning: too few segments of {task} in {cfg.data} to hold some out: "
                  "it is judged on ones that were trained on")
            seen_before.append(task)
        heldout += judge[:cfg.play_replay]
    pack_segments(cfg, "play", folder.with_name("replay"), heldout, trained_on=seen_before)
    replace_folder(temporary, folder)


def use_given_demos(cfg, folder):
    """Up to demo_count segments of the task in the dataset of --data.

    Those that judge are cloned only if there are no others."""
    given = check_data(cfg)
    segments, _, _ = divided(cfg.task, given.segments, load(cfg, "play"))
    if not segments:
        raise InputError(f"{cfg.data} has no segments of {cfg.task} to clone, of more than {SHORTEST} "
                         f"frames: 'python data.py inspect {cfg.data}' lists those it has")
    segments = segments[:cfg.demo_count]
    print(f"  {len(segments)} demonstrations of {cfg.task} in {cfg.data}")
    pack_segments(cfg, "demos", folder, segments)


SHORTEST = 8                        # a segment's last frame less its first: fewer teach nothing


def pack_segments(cfg, stage, folder, segments, **more):
    """Copy segments [(task, first, last)] of the dataset of --data into one of their own, an episode each.

    Without segments no dataset is written."""
    given = Dataset(cfg.data)
    parts = folder.with_name(folder.name + ".parts")
    shutil.rmtree(folder, ignore_errors=True)
    if not segments:
        return
    paths = []
    placed = []
    for i, (task, a, b) in enumerate(segments):
        paths.append(parts / f"{i}.npz")
        placed.append((task, 0, b - a))
        save_part(paths[-1], {key: given[key][a:b + 1] for key in FIELDS})
    meta = {key: given.meta[key] for key in ("source", "renderer", "keeps_target") if key in given.meta}
    meta["first_targets"] = targets_at(given, [a for _, a, _ in segments])
    meta = dict(meta, **more, **origin(cfg, stage), versions=versions(cfg))
    pack(paths, folder, meta, placed)
    shutil.rmtree(parts)


def targets_at(given, frames):
    """Where had the arm been told to be, some centimetres ahead, when these frames were recorded?

    A piece that is cut out of an episode begins with that, where targets are kept.  -> list of [6]"""
    robot, actions = (np.array(given[key]) for key in ("robot_obs", "rel_actions"))
    return commanded_targets(robot, actions, given.episodes)[frames].tolist()
