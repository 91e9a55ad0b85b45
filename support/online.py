"""online.py: the road that DiWA does not take: the same PPO on simulators instead of a dream.

    python diwa.py --stage online --task T                      after --stage all --task T

practises, from the same cloned policy, until it is as good as the policy tuned in the dream, and counts its
simulator steps.  Table and figure: support/interactions.py.
"""
import concurrent.futures
import copy
import math

import numpy as np
import torch

import calvin_sim
from support import evaluate, interactions
from support.files import InputError
from support.runs import calm_torch_worker, load, make_sim, seed_everything, sim_of, worker_context

# --- simulators ---------------------------------------------------------------------------------------------

class Arms:
    """Simulators of one process, each with an arm at the same task."""

    def __init__(self, cfg, sims):
        self.task = cfg.task
        self.stride = cfg.wm_stride
        self.sims = sims
        self.seen = [None] * len(sims)
        self.first = [None] * len(sims)

    def begin(self, starts):
        """{arm: (robot_obs, scene_obs)} -> {arm: its first observation}"""
        for i, start in starts.items():
            self.seen[i] = self.sims[i].reset(*start)
            self.first[i] = self.seen[i]["scene_obs"]
        return {i: self.seen[i] for i in starts}

    def chunk(self, actions):
        """{arm: H actions [H, 7]} -> {arm: (its H observations, success, steps)}

        An arm that has succeeded stands still.  Pictures are in every wm_stride-th observation only, for the
        frames in between are not filtered."""
        done = {}
        for i, own in actions.items():
            seen = []
            success = False
            steps = 0
            for k, action in enumerate(own):
                look = (k + 1) % self.stride == 0
                if not success:
                    self.seen[i] = {**self.seen[i], **self.sims[i].step(action, look)}
                    success = calvin_sim.success(self.task, self.first[i], self.seen[i]["scene_obs"])
                    steps += 1
                seen.append(self.seen[i] if look else {"robot_obs": self.seen[i]["robot_obs"]})
            done[i] = seen, success, steps
        return done


class ArmsElsewhere:
    """The same in a process of its own: its methods return futures."""

    def __init__(self, cfg, count):
        self.pool = concurrent.futures.ProcessPoolExecutor(1, worker_context(), build, (cfg, count))

    def begin(self, starts):
        return self.pool.submit(call, "begin", starts)

    def chunk(self, actions):
        return self.pool.submit(call, "chunk", actions)


def build(cfg, count):
    """In the new process: its arms, kept for the calls that follow."""
    global arms
    calm_torch_worker()
    arms = Arms(cfg, [make_sim(**sim_of(cfg)) for _ in range(count)])


def call(name, given):
    return getattr(arms, name)(given)


def result_of(answer):
    return answer.result() if isinstance(answer, concurrent.futures.Future) else answer


class SimEnv:
    """The same interface as DreamEnv over real simulators.

    Its PPO is the online rival DPPO, with the world model as encoder.  groups: Arms, here or in other
    processes.  What happens does not depend on how arms are grouped: starts and noise are drawn here."""

    def __init__(self, cfg, agent, groups):
        self.cfg = cfg
        self.wm = agent.wm
        self.filter = agent
        self.groups = groups
        self.horizon = cfg.ft_horizon
        self.simulator_steps = 0                            # what DiWA does without

    def state_dict(self):
        return dict(simulator_steps=self.simulator_steps)

    def load_state_dict(self, content):
        self.simulator_steps = content["simulator_steps"]

    def ask(self, name, given):
        """Let all groups do something at the same time.

        {arm: what is given} -> {arm: what comes back}, in the order of the arms: each draws its noise"""
        n = len(self.groups)
        parts = [{i // n: value for i, value in given.items() if i % n == g} for g in range(n)]
        try:
            answers = [getattr(group, name)(part) for group, part in zip(self.groups, parts)]
            answers = [result_of(answer) for answer in answers]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise InputError("a simulator process died (killed, or for lack of memory?): free some memory or "
                             "give fewer --workers, then type the same command again: it goes on where it "
                             "stopped") from error
        found = {n * i + g: value for g, answer in enumerate(answers) for i, value in answer.items()}
        return dict(sorted(found.items()))

    def fresh(self, arms):
        """{arm: a start state of the task}, drawn anew"""
        return {int(i): calvin_sim.sample_start(self.cfg.task, self.rng) for i in arms}

    def reset(self):
        # by torch's seed, which every update sets: so a resumed run goes on as if nothing had happened
        self.rng = np.random.default_rng(int(torch.randint(2 ** 62, ())))
        return self.begin(self.fresh(range(self.cfg.ft_dreams)))

    def begin(self, starts):
        seen = self.ask("begin", starts)
        self.age = np.zeros(len(starts), int)
        self.filter.reset(len(starts))
        return self.filter.observe(stacked(seen[i] for i in range(len(starts))))

    def step(self, chunk):
        """See DreamEnv; chunk [B, H, 7]"""
        device = chunk.device
        told = np.stack([self.filter.execute(action) for action in chunk.unbind(1)], 1)   # [B, H, 7]
        answers = self.ask("chunk", dict(enumerate(told)))
        seen, success, steps = zip(*(answers[i] for i in range(len(told))))
        for action, frames in zip(chunk.unbind(1), zip(*seen)):
            self.filter.execute(action)
            final = self.filter.observe(stacked(frames))
        self.simulator_steps += sum(steps)
        self.age += 1
        done = np.array(success)
        truncated = (self.age >= self.horizon) & ~done
        feature = final.clone()
        for i, first in self.ask("begin", self.fresh(np.flatnonzero(done | truncated))).items():
            self.age[i] = 0
            single = copy.copy(self.filter)                 # the same networks, a memory of its own
            single.reset(1)
            feature[i] = single.observe(stacked([first]))[0]
            for name in ("h", "z", "action", "target", "tcp"):
                getattr(self.filter, name)[i] = getattr(single, name)[0]
        flags = [torch.from_numpy(x).to(device) for x in (done, truncated)]
        return feature, flags[0].float(), *flags, final

    def successes(self, actor, seeds):
        """One episode from the start state of each seed, as the robot would act -> bool [n]

        Its steps are not counted: they judge, they do not teach."""
        before = self.horizon, self.simulator_steps
        self.rng = np.random.default_rng(0)                 # of what begins when an arm is done: ignored
        self.horizon = self.cfg.eval_steps // self.cfg.bc_chunk
        found = []
        for some in np.array_split(seeds, -(-len(seeds) // self.cfg.ft_dreams)):
            starts = [calvin_sim.sample_start(self.cfg.task, np.random.default_rng(seed)) for seed in some]
            feature = self.begin(dict(enumerate(starts)))
            success = over = torch.zeros(len(starts), dtype=torch.bool, device=feature.device)
            for _ in range(self.horizon):
                feature, _, terminated, truncated, _ = self.step(actor.act(feature))
                success = success | terminated & ~over
                over = over | terminated | truncated
            found.append(success)
        self.horizon, self.simulator_steps = before
        return torch.cat(found)


def stacked(observations):
    """Observations of many arms -> {key: a list with each arm's}"""
    observations = list(observations)
    return {key: [o[key] for o in observations] for key in observations[0]}


def simulators(cfg):
    """ft_dreams tabletops in `workers` processes."""
    count = min(cfg.workers, cfg.ft_dreams)
    return [ArmsElsewhere(cfg, -(-cfg.ft_dreams // count)) for _ in range(count)]


# --- the stage ----------------------------------------------------------------------------------------------


class Rival:
    """Is the policy as good as the one tuned in the dream, from the start states of the learning curve?

    Asked after each iteration, of 40 start states: now and then the answer is a lucky yes, so the rival's
    steps are rather too few than too many."""

    def __init__(self, cfg, env):
        self.cfg = cfg
        self.env = env
        self.evaluation = load(cfg, "eval")
        self.reported, self.others = evaluate.start_seeds(cfg)
        self.curve = self.evaluation["curve"]
        self.target = self.curve[max(self.curve, key=int)]
        # an iteration takes at most so many steps
        steps = cfg.ft_dreams * cfg.ft_chunks * cfg.bc_chunk
        self.iterations = max(cfg.ft_warmup + 1, math.ceil(cfg.online_steps / steps))

    def reached(self, actor, metrics):
        """-> bool; adds the success and the steps so far to the metrics"""
        metrics["success"] = self.env.successes(actor, self.others).float().mean()
        metrics["steps"] = torch.tensor(float(self.env.simulator_steps))
        return interactions.matches(metrics["success"], self.target)

    def judged(self, actor):
        """Success from the reported start states, beside those of before and after in the dream -> results

        Writes them, and the rival's way there, as a row."""
        seed_everything("evaluate", int(self.reported[0]))
        results = {name: [e["success"] for e in rows] for name, rows in self.evaluation["results"].items()}
        results["online"] = self.env.successes(actor, self.reported).tolist()
        interactions.write_row(self.cfg, self.target, self.curve["0"], self.env.simulator_steps, results)
        return dict(results=results)
