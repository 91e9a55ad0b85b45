"""evaluate.py: policies meet a simulator (or, without one, a dream), each from the same start states.

Never on the way from recordings to a tuned policy: its first simulator step is here.  Then the last two
stages of diwa.py, eval and report.
"""
import dataclasses
import json

import numpy as np
import torch

import calvin_sim
from data import Recording
from support import report
from support.files import write_atomic
from support.runs import (PIPELINE, apart, changed_settings, first_seed, in_processes, load, load_file,
                          load_heldout, make_sim, origin, output, read_log, seed_everything, sim_of, versions)


def evaluation_job(job):
    """One simulator process: run the agent from each group of start seeds.

    The tabletops of a group go in lock step.  -> list of episodes, see run_episodes"""
    cfg = dataclasses.replace(job["cfg"], device="cpu")
    groups = job["groups"]
    agent = job["load_agent"](cfg, job["policy"])
    results = []
    sims = [make_sim(**sim_of(cfg)) for _ in range(max(len(group) for group in groups))]
    for group in groups:
        seed_everything("evaluate", group[0])
        about = cfg, agent, sims[:len(group)], group, job["record"], job["draw"]
        results += apart(cfg.sim, run_episodes, *about)
    for sim in sims:
        sim.close()
    return results


def run_episodes(cfg, agent, sims, seeds, record=(), draw=calvin_sim.sample_start):
    """An episode a seed -> [dict(seed, success, steps, truth, real, dream, dreamed_success)]

    truth, real, dream: verdicts at chunk ends; and frames for the seeds in record."""
    B = len(sims)
    H = cfg.bc_chunk
    starts = [draw(cfg.task, np.random.default_rng(seed)) for seed in seeds]
    obs = [sim.reset(*state) for sim, state in zip(sims, starts)]
    start = np.stack([o["scene_obs"] for o in obs])
    solved = np.zeros(B, bool)
    steps = np.full(B, cfg.eval_steps)
    frames = [[] for _ in range(B)]
    real = []
    truth = []
    actions = []
    agent.reset(B)
    for t in range(cfg.eval_steps + 1):
        shared = set.intersection(*(set(o) for o in obs))    # pictures only where everyone has them
        action = agent.act({k: [o[k] for o in obs] for k in shared})
        if t and t % H == 0:
            real.append(agent.verdict())
            truth.append(solved.copy())
        for i in range(B):
            if seeds[i] in record and (not frames[i] or steps[i] >= t):
                frames[i].append(np.concatenate([obs[i]["rgb_static"], obs[i]["rgb_gripper"]], 1))
        if t == cfg.eval_steps or (t >= steps + H).all() and t % H == 0:
            break
        actions.append(torch.from_numpy(action))
        # a chunk more than it takes: the classifier deserves a second look
        for i in np.flatnonzero(t < steps + H):
            last = t + 1 == steps[i] + H                    # what it shows stands for the arm from then on
            look = (t + 1) % cfg.wm_stride == 0 or last or seeds[i] in record
            obs[i] = sims[i].step(action[i], look=look)
            if not solved[i] and calvin_sim.success(cfg.task, start[i], obs[i]["scene_obs"]):
                solved[i] = True
                steps[i] = t + 1
    dream = agent.dream(torch.stack(actions, 1))
    dreamed = agent.dream().any(1)
    real = np.stack(real, 1)                                                                 # [B, T / H]
    truth = np.stack(truth, 1)
    ends = 1 - -steps // H                                  # so many count of an episode
    episodes = []
    for i in range(B):
        episode = dict(
            seed=int(seeds[i]),
            success=bool(solved[i]),
            steps=int(steps[i]),
            truth=[int(v) for v in truth[i, :ends[i]]],
            real=[int(v) for v in real[i, :ends[i]]],
            dream=[int(v) for v in dream[i, :ends[i]]],
            dreamed_success=bool(dreamed[i]),
        )
        if frames[i]:
            episode["frames"] = frames[i]
        episodes.append(episode)
    return episodes


def evaluate(cfg, load_agent, policies, seeds, record=(), finished=None, keep=None,
             draw=calvin_sim.sample_start):
    """Every policy in the simulator, from the start states of the seeds -> {policy: episodes}

    A policy is "bc", "tuned" or a snapshot's iteration.
    load_agent(cfg, policy) -> an agent: a function of a module, since worker processes call it.
    A group shares its noise, so the groups depend on the seeds alone, never on the number of processes.
    record: seeds whose frames are kept.
    finished: {policy/first seed of a group: episodes} that need not be done again.
    keep(finished) saves it.  draw(task, rng): the start state of a seed."""
    size = group_size(cfg)
    groups = [[int(s) for s in seeds[a:a + size]] for a in range(0, len(seeds), size)]
    finished = {} if finished is None else finished
    jobs_a_policy = cfg.workers if cfg.sim == "tabletop" else max(cfg.workers, len(seeds) // 10)
    share = -(-len(groups) // jobs_a_policy)
    jobs = []
    for policy in policies:
        todo = [group for group in groups if f"{policy}/{group[0]}" not in finished]
        for a in range(0, len(todo), share):
            part = todo[a:a + share]
            job = dict(cfg=cfg, load_agent=load_agent, policy=policy, groups=part, record=record, draw=draw)
            jobs.append(job)
    for job, episodes in zip(jobs, in_processes(cfg, evaluation_job, jobs, "evaluation") if jobs else ()):
        for group in job["groups"]:
            finished[f"{job['policy']}/{group[0]}"] = [e for e in episodes if e["seed"] in group]
        if keep:
            keep(finished)
    results = {}
    for policy in policies:
        results[policy] = [e for group in groups for e in finished[f"{policy}/{group[0]}"]]
    return results


def dream_evaluation(cfg, load_agent):
    """Without a simulator: before and after in the dream.

    Once from each recorded first frame of the held-out demonstrations.
    -> results, dream_success, trained_on: the frames are those of demonstrations that the policy was cloned
    from, for want of others"""
    recording = load_heldout(cfg)
    begin = []
    if recording:
        begin = [a for task, a, _ in recording.segments if task == cfg.task]
    trained_on = not begin or cfg.task in recording.meta.get("trained_on", [])
    if not begin:
        recording = load(cfg, "demos")
        begin = [a for _, a, _ in recording.segments]
    frames = np.array(begin[:cfg.eval_episodes])
    results = {}
    for policy in ("bc", "tuned"):
        seed_everything("evaluate", cfg.seed)
        agent = load_agent(cfg, policy)
        agent.reset(len(frames))
        agent.observe({key: recording[key][frames] for key in ("rgb_static", "rgb_gripper", "robot_obs")})
        dreamed = agent.dream().any(1)
        results[policy] = [dict(frame=int(f), success=bool(s)) for f, s in zip(frames, dreamed)]
    dream_success = float(np.mean([r["success"] for r in results["tuned"]]))
    return dict(results=results, curve={}, dream_success=dream_success, trained_on=trained_on)


def start_seeds(cfg):
    """Seeds of the start states that are reported, and of others, for the learning curve."""
    reported, others = (first_seed(cfg, purpose, cfg.task) for purpose in ("eval", "curve"))
    return reported + np.arange(cfg.eval_episodes), others + np.arange(cfg.eval_curve)


def rollout_path(cfg, name):
    return output(cfg, "eval").with_name(f"rollout_{name}_{cfg.task}.gif")


def before_and_after(cfg, load_agent):
    """Before and after on the same start states; the learning curve on others.

    The tuned policy's first simulator step is here."""
    path = output(cfg, "eval")
    practised = load(cfg, "finetune").get("simulator_steps", 0)
    for name in ("before", "after"):
        rollout_path(cfg, name).unlink(missing_ok=True)     # of an older evaluation
    if cfg.sim == "none":
        content = dict(origin(cfg, "eval"), **dream_evaluation(cfg, load_agent), simulator_steps=practised)
        return write_atomic(path, lambda p: p.write_text(json.dumps(content)))
    partial = path.with_suffix(".partial.json")
    content = load_file(partial) if partial.exists() else {}
    finished = content["finished"] if content.get("origin") == origin(cfg, "eval") else {}

    def keep(finished):
        content = dict(origin=origin(cfg, "eval"), finished=finished)
        write_atomic(partial, lambda p: p.write_text(json.dumps(content)))

    reported, others = start_seeds(cfg)
    results = evaluate(cfg, load_agent, ("bc", "tuned"), reported, (), finished, keep)
    snapshots = []
    if cfg.eval_curve:
        snapshots = ["bc", *sorted(load(cfg, "finetune")["snapshots"], key=int)]
    curve = {}
    for policy, episodes in evaluate(cfg, load_agent, snapshots, others, (), finished, keep).items():
        curve["0" if policy == "bc" else policy] = float(np.mean([e["success"] for e in episodes]))
    official = {}
    if cfg.sim == "calvin" and cfg.eval_official:
        seeds = first_seed(cfg, "official", cfg.task) + np.arange(cfg.eval_official)
        draw = calvin_sim.official_start
        official = evaluate(cfg, load_agent, ("bc", "tuned"), seeds, (), finished, keep, draw)
    dream_success = float(np.mean([r["dreamed_success"] for r in results["tuned"]]))
    content = dict(origin(cfg, "eval"), results=results, official=official, curve=curve,
                   dream_success=dream_success, simulator_steps=practised)
    write_atomic(path, lambda p: p.write_text(json.dumps(content)))
    partial.unlink(missing_ok=True)


def group_size(cfg):
    """Episodes in lock step, so that the networks run batched; of calvin_env there is one a process."""
    return 10 if cfg.sim == "tabletop" else 1


def one_policy(cfg, load_agent):
    """--policy: one policy from the reported start states, in a file of its own, beside the report."""
    reported, _ = start_seeds(cfg)
    episodes = evaluate(cfg, load_agent, [cfg.policy], reported)[cfg.policy]
    path = output(cfg, "eval").with_name(f"eval_{cfg.task}_{cfg.policy}.json")
    content = dict(origin(cfg, "eval"), results={cfg.policy: episodes})
    write_atomic(path, lambda p: p.write_text(json.dumps(content)))
    real, dreamed = (report.rate([e[key] for e in episodes]) for key in ("success", "dreamed_success"))
    print(f"{cfg.policy}: {real} of {len(episodes)} start states in the simulator, {dreamed} in the dream; "
          f"{path}")


def record_rollouts(cfg, load_agent, results):
    """The gifs before and after: two episodes run again with a camera.

    They are failures that became successes where there are some."""
    seeds, _ = start_seeds(cfg)
    pairs = zip(results["bc"], results["tuned"])
    turned = [old["seed"] for old, new in pairs if new["success"] and not old["success"]]
    chosen = list(dict.fromkeys([*turned, *map(int, seeds)]))[:2]
    size = group_size(cfg)
    firsts = sorted({size * ((seed - int(seeds[0])) // size) for seed in chosen})
    group = np.concatenate([seeds[a:a + size] for a in firsts])         # whole groups: they share their noise
    again = evaluate(cfg, load_agent, ("bc", "tuned"), group, chosen)
    for policy, name in (("bc", "before"), ("tuned", "after")):
        report.gif(rollout_path(cfg, name), [f for r in again[policy] for f in r.get("frames", ())])


@torch.no_grad()
def write_report(cfg, load_agent):
    """Tables and pictures from what the other stages left behind.

    The dream is of a held-out demonstration, from its first frame."""
    folder = output(cfg, "eval").parent
    evaluation = load(cfg, "eval")
    trust = load(cfg, "reward")["trust"]
    if cfg.sim != "none" and not all(rollout_path(cfg, name).exists() for name in ("before", "after")):
        record_rollouts(cfg, load_agent, evaluation["results"])
    dream_log = read_log(cfg, "finetune", "dream_success")
    picture = folder / f"curves_{cfg.task}.png"
    report.curves(picture, cfg.task, dream_log, evaluation, cfg.eval_curve, trust, cfg.sim != "none")
    agent = load_agent(cfg, "bc")
    wm = agent.wm
    source, (a, b) = shown_span(cfg)
    recording = Recording(cfg, source)                      # one clip of it: no codes in advance
    seed_everything(cfg.seed, "dream", cfg.task)            # the same film, whenever it is asked for
    seen, dreamed, frames = wm.watch_and_dream(recording, np.array([a]), b - a + 1)
    start = dreamed[:, :1].expand_as(dreamed)
    score = agent.classifier(start, dreamed)[1].softmax(-1)[0, :, 1].cpu().numpy()
    truth = [recording.ds[k][frames[0]] for k in ("rgb_static", "rgb_gripper")]
    watched, imagined = ([i[0].cpu().numpy() for i in wm.images(f)] for f in (seen, dreamed))
    strip = report.dream_strip(truth, watched, imagined, score)
    report.gif(folder / f"dream_{cfg.task}.gif", strip, 2, cfg.wm_stride)
    logs = {key: read_log(cfg, *key) for key in report.healthy_terms(dataclasses.asdict(cfg))}
    logs = {key: curve for key, curve in logs.items() if curve[1]}
    report.health(folder / f"health_{cfg.task}.png", cfg.task, logs)
    ends = {".".join(key): report.end_of(values) for key, (_, values) in logs.items()}
    minutes = {}
    for stage in PIPELINE:                                  # what a rival took is its own report's
        if values := read_log(cfg, stage, "minutes")[1]:
            minutes[stage] = values[-1]
    heldout = load_heldout(cfg)
    trained_on = heldout.meta.get("trained_on", []) if heldout else []
    judged = dict(load(cfg, "wm")["judged"], trust=trust, trained_on=trained_on)
    settings = dataclasses.asdict(cfg)
    about = (folder, cfg.task, settings, changed_settings(cfg), versions(cfg))
    lines = report.write(*about, evaluation, judged, minutes, ends)
    print("\n".join(lines[4:11]) + f"\n\nreport: {folder / 'report.md'}")


def shown_span(cfg):
    """What the dream's picture shows -> dataset, (first, last)

    The first demonstration of the task that was held out, else a stretch of held-out play."""
    heldout = load_heldout(cfg)
    play = load(cfg, "play")
    spans = []
    if heldout:
        spans = [(a, b) for task, a, b in heldout.segments if task == cfg.task]
    if spans:
        return heldout, spans[0]
    a, b = play.split()[1][0]
    return play, (a, min(b, a + cfg.eval_steps))
