"""evaluate.py: policies meet a simulator (or, without one, a dream), each from the same start states.  Only here, and never on the way from recordings to a tuned policy.
Then the last two stages of diwa.py, eval and report.

SimEnv, at the end, is the road that DiWA does not take: the same PPO on a simulator instead of a dream.
"""
import dataclasses
import json

import numpy as np
import torch

import calvin_sim
import report
from data import Dataset, write_atomic
from recording import Recording
from runs import STAGES, in_processes, load, make_sim, output, read_log, seed_everything, sim_of, stamp, versions


def evaluation_job(job):
    """One simulator process: run the agent from each group of start seeds, the tabletops of a group in lock step.  -> list of episodes, see run_episodes"""
    import diwa                                             # here: diwa.py imports this file
    cfg, policy, groups, record = diwa.Config(**job["cfg"]), job["policy"], job["groups"], job["record"]
    torch.set_num_threads(1)
    cfg.device = "cpu"
    wm, actor, classifier = diwa.load_policy(cfg, policy)
    agent, results = diwa.Agent(cfg, wm, actor), []
    sims = [make_sim(**sim_of(cfg)) for _ in range(max(len(group) for group in groups))]
    for group in groups:
        seed_everything("evaluate", group[0])
        results += run_episodes(cfg, agent, classifier, sims[:len(group)], group, record if group is groups[0] else 0)
    for sim in sims:
        sim.close()
    return results


def run_episodes(cfg, agent, classifier, sims, seeds, record=0):
    """An episode a seed -> [dict(seed, success, steps, truth, real, dream: verdicts at chunk ends, dreamed_success, frames of the first few)]."""
    from diwa import dream_on, feature_of
    B, H = len(sims), cfg.bc_chunk
    obs = [sim.reset(*calvin_sim.sample_start(cfg.task, np.random.default_rng(seed))) for sim, seed in zip(sims, seeds)]
    start, solved, steps = np.stack([o["scene_obs"] for o in obs]), np.zeros(B, bool), np.full(B, cfg.eval_steps)
    frames, real, truth, actions = [[] for _ in range(B)], [], [], []
    agent.reset(B)
    for t in range(cfg.eval_steps + 1):
        action = agent.act({k: [o[k] for o in obs] for k in obs[0]})
        if t == 0:
            begin, first = agent.state, feature_of(agent.state)
        elif t % H == 0:
            real.append(classifier.success(first, feature_of(agent.state)).numpy()), truth.append(solved.copy())
        for i in range(min(B, record)):
            if not frames[i] or steps[i] >= t:
                frames[i].append(np.concatenate([obs[i]["rgb_static"], obs[i]["rgb_gripper"]], 1))
        if t == cfg.eval_steps or (t >= steps + H).all() and t % H == 0:
            break
        actions.append(torch.from_numpy(action))
        for i in np.flatnonzero(t < steps + H):             # a chunk more than it takes: the classifier deserves a second look
            obs[i] = sims[i].step(action[i])
            if not solved[i] and calvin_sim.success(cfg.task, start[i], obs[i]["scene_obs"]):
                solved[i], steps[i] = True, t + 1
    dream = replay_in_dream(agent.wm, classifier, begin, first, torch.stack(actions, 1), H)
    dreamed = dream_on(cfg, agent.wm, agent.actor, classifier, begin, first)
    real, truth, ends = np.stack(real, 1), np.stack(truth, 1), 1 - -steps // H                        # [B, T / H]
    cut = lambda x, i: [int(v) for v in x[i, :ends[i]]]
    return [dict(seed=int(seeds[i]), success=bool(solved[i]), steps=int(steps[i]), truth=cut(truth, i), real=cut(real, i), dream=cut(dream, i),
                 dreamed_success=bool(dreamed[i]), frames=frames[i]) for i in range(B)]


@torch.no_grad()
def replay_in_dream(wm, classifier, state, first, actions, chunk):
    """Replay executed actions [B, T, 7] in the dream from the agent's first state: the classifier's verdicts at chunk ends [B, T / H]."""
    from diwa import dream_chunk
    verdicts = []
    for part in actions[:, :actions.shape[1] // chunk * chunk].split(chunk, 1):
        state, verdict = dream_chunk(wm, classifier, state, first, part)
        verdicts.append(verdict)
    return torch.stack(verdicts, 1).cpu().numpy()


def evaluate(cfg, policies, seeds, record=0):
    """Every policy ("bc", "tuned" or a snapshot's iteration) in the simulator, from the start states of the seeds -> {policy: episodes}

    A group shares its noise, so the groups depend on the seeds alone, never on the number of processes."""
    size = 10 if cfg.sim == "tabletop" else 1               # in lock step, so that the networks run batched; calvin_env: one a process
    groups = [[int(s) for s in seeds[a:a + size]] for a in range(0, len(seeds), size)]
    jobs_a_policy = cfg.workers if cfg.sim == "tabletop" else max(cfg.workers, len(seeds) // 10)
    share = -(-len(groups) // jobs_a_policy)
    jobs = [dict(cfg=dataclasses.asdict(cfg), policy=policy, groups=groups[a:a + share], record=record * (a == 0))
            for policy in policies for a in range(0, len(groups), share)]
    results = {policy: [] for policy in policies}
    for job, episodes in zip(jobs, in_processes(cfg, evaluation_job, jobs, "evaluation")):
        results[job["policy"]] += episodes
    return results


def dream_evaluation(cfg):
    """Without a simulator: before and after in the dream, from the recorded first frames of the judging demonstrations.  -> results, dream_success"""
    from diwa import Agent, dream_on, load_policy
    replay = Dataset(output(cfg, "play").with_name("replay"))
    begin = np.array([a for task, a, _ in replay.segments if task == cfg.task])
    frames, results = begin[np.arange(cfg.eval_episodes) % len(begin)], {}
    for policy in ("bc", "tuned"):
        seed_everything("evaluate", cfg.seed)
        wm, actor, classifier = load_policy(cfg, policy)
        agent = Agent(cfg, wm, actor)
        agent.reset(len(frames))
        first = agent.observe({key: replay[key][frames] for key in ("rgb_static", "rgb_gripper", "robot_obs")})
        results[policy] = [dict(frame=int(f), success=bool(s)) for f, s in zip(frames, dream_on(cfg, wm, actor, classifier, agent.state, first))]
    return dict(results=results, curve={}, dream_success=float(np.mean([r["success"] for r in results["tuned"]])))


def stage_eval(cfg):
    """Before and after on the same start states; the learning curve on others.  Only here does the new policy meet a simulator."""
    if cfg.sim == "none":
        content = dict(stamp=stamp(cfg, "eval"), **dream_evaluation(cfg))
        return write_atomic(output(cfg, "eval"), lambda p: p.write_text(json.dumps(content)))
    base = 1_000_000 * (cfg.seed + 1) + 900_000 + 10_000 * list(calvin_sim.TASKS).index(cfg.task)
    results = evaluate(cfg, ("bc", "tuned"), base + np.arange(cfg.eval_episodes), record=2)
    for policy, name in (("bc", "before"), ("tuned", "after")):
        report.gif(output(cfg, "eval").with_name(f"rollout_{name}_{cfg.task}.gif"), [f for r in results[policy] for f in r.pop("frames")])
    others = evaluate(cfg, ["bc", *sorted(load(cfg, "finetune")["snapshots"], key=int)], base + 5000 + np.arange(cfg.eval_curve))
    curve = {"0" if policy == "bc" else policy: float(np.mean([r["success"] for r in episodes])) for policy, episodes in others.items()}
    content = dict(stamp=stamp(cfg, "eval"), results=results, curve=curve, dream_success=float(np.mean([r["dreamed_success"] for r in results["tuned"]])))
    write_atomic(output(cfg, "eval"), lambda p: p.write_text(json.dumps(content)))


@torch.no_grad()
def stage_report(cfg):
    """Tables and pictures from what the other stages left behind; the dream is of a held-out demonstration, from its first frame."""
    from diwa import load_policy, views
    folder, evaluation = output(cfg, "eval").parent, load(cfg, "eval")
    report.curves(folder / f"curves_{cfg.task}.png", cfg.task, read_log(cfg, "finetune", "dream_success"), evaluation, cfg.eval_curve, load(cfg, "reward")["trust"])
    wm, _, classifier = load_policy(cfg, "bc")
    replay = Recording(cfg, Dataset(output(cfg, "play").with_name("replay")), wm)
    a, b = next((a, b) for t, a, b in replay.ds.segments if t == cfg.task)
    seen, dreamed, frames = views(wm, replay, np.array([a]), b - a + 1)
    score = classifier(dreamed[:, :1].expand_as(dreamed), dreamed)[1].softmax(-1)[0, :, 1].cpu().numpy()
    truth = [replay.ds[k][frames[0]] for k in ("rgb_static", "rgb_gripper")]
    watched, imagined = ([i[0].cpu().numpy() for i in wm.images(f)] for f in (seen, dreamed))
    report.gif(folder / f"dream_{cfg.task}.gif", report.dream_strip(truth, watched, imagined, score), 2, cfg.wm_stride)
    minutes = {stage: read_log(cfg, stage, "minutes")[1][-1] for stage in STAGES if read_log(cfg, stage, "minutes")[1]}
    lines = report.write(folder, cfg.task, dataclasses.asdict(cfg), versions(cfg), evaluation, dict(load(cfg, "wm")["judged"], trust=load(cfg, "reward")["trust"]), minutes)
    print("\n".join(lines[4:11]) + f"\n\nreport: {folder / 'report.md'}")


class SimEnv:
    """The same interface as DreamEnv over real simulators: its PPO is the online rival DPPO, with the world model as encoder."""

    def __init__(self, cfg, wm, sims, seed):
        from diwa import Agent
        self.cfg, self.wm, self.sims, self.horizon, self.filter = cfg, wm, sims, cfg.ft_horizon, Agent(cfg, wm, None)
        self.rng = np.random.default_rng(seed)

    def reset(self):
        self.obs = [sim.reset(*calvin_sim.sample_start(self.cfg.task, self.rng)) for sim in self.sims]
        self.start, self.age = [o["scene_obs"] for o in self.obs], np.zeros(len(self.sims), int)
        self.filter.reset(len(self.sims))
        return self.filter.observe({k: [o[k] for o in self.obs] for k in self.obs[0]})

    def step(self, chunk):
        from diwa import Agent, executed
        device, done = chunk.device, np.zeros(len(self.sims), bool)
        for k in range(chunk.shape[1]):
            self.filter.action = executed(chunk[:, k])
            for i, sim in enumerate(self.sims):
                if not done[i]:
                    self.obs[i] = sim.step(self.filter.action[i].cpu().numpy())
                    done[i] = calvin_sim.success(self.cfg.task, self.start[i], self.obs[i]["scene_obs"])
            final = self.filter.observe({k: [o[k] for o in self.obs] for k in self.obs[0]})
        self.age += 1
        truncated, feature = (self.age >= self.horizon) & ~done, final.clone()
        for i in np.flatnonzero(done | truncated):
            self.obs[i] = self.sims[i].reset(*calvin_sim.sample_start(self.cfg.task, self.rng))
            self.start[i], self.age[i] = self.obs[i]["scene_obs"], 0
            single = Agent(self.cfg, self.filter.wm, None)
            single.reset(1)
            feature[i] = single.observe({k: [v] for k, v in self.obs[i].items()})[0]
            for name in ("h", "z", "action", "target", "tcp"):
                getattr(self.filter, name)[i] = getattr(single, name)[0]
        flags = [torch.from_numpy(x).to(device) for x in (done, truncated)]
        return feature, flags[0].float(), *flags, final
