"""online.py: the road that DiWA does not take: the same PPO on simulators instead of a dream."""
import copy

import numpy as np
import torch

import calvin_sim


class SimEnv:
    """The same interface as DreamEnv over real simulators.

    Its PPO is the online rival DPPO, with the world model as encoder."""

    def __init__(self, cfg, agent, sims, seed):
        self.cfg = cfg
        self.wm = agent.wm
        self.sims = sims
        self.horizon = cfg.ft_horizon
        self.filter = agent
        self.rng = np.random.default_rng(seed)
        self.simulator_steps = 0                            # what DiWA does without

    def state_dict(self):
        return dict(simulator_steps=self.simulator_steps)

    def load_state_dict(self, content):
        self.simulator_steps = content["simulator_steps"]

    def reset(self):
        self.obs = [sim.reset(*calvin_sim.sample_start(self.cfg.task, self.rng)) for sim in self.sims]
        self.start = [o["scene_obs"] for o in self.obs]
        self.age = np.zeros(len(self.sims), int)
        self.filter.reset(len(self.sims))
        return self.filter.observe({k: [o[k] for o in self.obs] for k in self.obs[0]})

    def step(self, chunk):
        device = chunk.device
        done = np.zeros(len(self.sims), bool)
        for k in range(chunk.shape[1]):
            action = self.filter.execute(chunk[:, k])
            look = (k + 1) % self.cfg.wm_stride == 0         # the frames in between are not filtered
            for i, sim in enumerate(self.sims):
                if not done[i]:                              # an arm that is done shows what it showed last
                    self.obs[i] = {**self.obs[i], **sim.step(action[i], look)}
                    self.simulator_steps += 1
                    done[i] = calvin_sim.success(self.cfg.task, self.start[i], self.obs[i]["scene_obs"])
            final = self.filter.observe({k: [o[k] for o in self.obs] for k in self.obs[0]})
        self.age += 1
        truncated = (self.age >= self.horizon) & ~done
        feature = final.clone()
        for i in np.flatnonzero(done | truncated):
            self.obs[i] = self.sims[i].reset(*calvin_sim.sample_start(self.cfg.task, self.rng))
            self.start[i] = self.obs[i]["scene_obs"]
            self.age[i] = 0
            single = copy.copy(self.filter)                 # the same networks, a memory of its own
            single.reset(1)
            feature[i] = single.observe({k: [v] for k, v in self.obs[i].items()})[0]
            for name in ("h", "z", "action", "target", "tcp"):
                getattr(self.filter, name)[i] = getattr(single, name)[0]
        flags = [torch.from_numpy(x).to(device) for x in (done, truncated)]
        return feature, flags[0].float(), *flags, final
