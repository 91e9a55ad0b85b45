"""evaluate.py: policies meet a simulator, each from the same start states.  Only here, and never on the way from recordings to a tuned policy.
"""
import dataclasses

import numpy as np
import torch

import calvin_sim
from runs import in_processes, make_sim, seed_everything, sim_of


def evaluation_job(job):
    """One simulator process: run the agent from the given start seeds, 16 tabletops in lock step.  -> list of episodes, see run_episodes"""
    import diwa                                             # here: diwa.py imports this file
    cfg, policy, seeds, record = diwa.Config(**job["cfg"]), job["policy"], job["seeds"], job["record"]
    torch.set_num_threads(1)
    cfg.device = "cpu"
    wm, actor, classifier = diwa.load_policy(cfg, policy)
    agent, results = diwa.Agent(cfg, wm, actor, frozen=policy == "bc"), []
    sims = [make_sim(**sim_of(cfg)) for _ in range(min(16 if cfg.sim == "tabletop" else 1, len(seeds)))]       # calvin_env: one a process
    for a in range(0, len(seeds), len(sims)):
        group = seeds[a:a + len(sims)]
        seed_everything("evaluate", group[0])
        results += run_episodes(cfg, agent, classifier, sims[:len(group)], group, record if a == 0 else 0)
    for sim in sims:
        sim.close()
    return results


def run_episodes(cfg, agent, classifier, sims, seeds, record=0):
    """An episode a seed -> [dict(seed, success, steps, truth, real, dream: verdicts at chunk ends, dreamed_success, frames of the first few)]."""
    from diwa import dream_on, feature_of, replay_in_dream
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
        if t == cfg.eval_steps or solved.all() and t % H == 0:
            break
        actions.append(torch.from_numpy(action))
        for i in np.flatnonzero(~solved):
            obs[i] = sims[i].step(action[i])
            if calvin_sim.success(cfg.task, start[i], obs[i]["scene_obs"]):
                solved[i], steps[i] = True, t + 1
    dream = replay_in_dream(agent.wm, classifier, begin, first, torch.stack(actions, 1), H)
    dreamed = dream_on(cfg, agent.wm, agent.actor, classifier, begin, first, agent.frozen)
    real, truth, ends = np.stack(real, 1), np.stack(truth, 1), -(-steps // H)                         # [B, T / H]
    cut = lambda x, i: [int(v) for v in x[i, :ends[i]]]
    return [dict(seed=int(seeds[i]), success=bool(solved[i]), steps=int(steps[i]), truth=cut(truth, i), real=cut(real, i), dream=cut(dream, i),
                 dreamed_success=bool(dreamed[i]), frames=frames[i]) for i in range(B)]


def evaluate(cfg, policies, seeds, record=0):
    """Every policy ("bc", "tuned" or a snapshot's iteration) in the simulator, from the start states of the seeds -> {policy: episodes}"""
    jobs_a_policy = cfg.workers if cfg.sim == "tabletop" else max(cfg.workers, len(seeds) // 10)
    plain, parts = dataclasses.asdict(cfg), [p for p in np.array_split(seeds, jobs_a_policy) if len(p)]
    jobs = [dict(cfg=plain, policy=policy, seeds=part, record=record * (i == 0)) for policy in policies for i, part in enumerate(parts)]
    results = {policy: [] for policy in policies}
    for job, episodes in zip(jobs, in_processes(cfg, evaluation_job, jobs, "evaluation")):
        results[job["policy"]] += episodes
    return results
