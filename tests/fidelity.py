"""Do the two simulators tell the same story?  The same start and the same 60 scripted actions in the built-in
tabletop and in calvin_env.

    CALVIN_ENV_ROOT=path/to/calvin_env python tests/fidelity.py [trials] [steps]
        prints what agrees, trial by trial
    CALVIN_ENV_ROOT=path/to/calvin_env python tests/fidelity.py pictures
        compares RealCalvin's to its own

The expert acts in the tabletop; the real simulator is given the very same actions, open loop.
Pictures: all frames of a demonstration of every task and of two episodes of play, at full size.
"""
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calvin_sim as cs  # noqa: E402
from support import expert  # noqa: E402
from support.calvin_real import RealCalvin  # noqa: E402

CLOSE = 0.02       # m
FEW = 4            # of the static picture's 40,000 pixels may show another object that is as far away


def compare(real, tabletop, seed, steps=60):
    """One trial -> task, the largest distance of the TCP and of each of the four joints over all steps (m),
    do both lights agree at the end."""
    name = list(cs.TASKS)[seed % len(cs.TASKS)]
    rng = np.random.default_rng([seed, 4])
    start = cs.sample_start(name, rng)
    guide = expert.Expert(name, rng)
    here = [tabletop.reset(*start)]
    there = [real.reset(*start)]
    for _ in range(steps):
        action = guide.act(here[-1]["robot_obs"], here[-1]["scene_obs"])
        here.append(tabletop.step(action))
        there.append(real.step(action))
    stories = here, there
    robot = np.stack([[obs["robot_obs"] for obs in story] for story in stories]).astype(float)
    scene = np.stack([[obs["scene_obs"] for obs in story] for story in stories]).astype(float)
    tcp = np.linalg.norm(robot[0, :, :3] - robot[1, :, :3], axis=-1).max()
    joints = np.abs(scene[0, :, :4] - scene[1, :, :4]).max(0)
    return name, tcp, joints, bool((scene[0, -1, 4:6] == scene[1, -1, 4:6]).all())


def main(trials=40, steps=60, root=None):
    """Print the table -> share of trials in which TCP and joints stay close, share in which the lights
    agree."""
    # first: see RealCalvin
    real = RealCalvin(render=False, root=root or os.environ.get("CALVIN_ENV_ROOT"))
    tabletop = cs.Tabletop(render=False)
    close = []
    lights = []
    print("largest distance over the trial, mm:   tcp  slider  drawer  button  switch   lights agree")
    for seed in range(trials):
        name, tcp, joints, same = compare(real, tabletop, seed, steps)
        close.append(max(tcp, *joints) < CLOSE)
        lights.append(same)
        distances = f"{1000 * tcp:7.1f}" + "".join(f"{1000 * j:8.1f}" for j in joints)
        agree = f"{'yes' if same else 'NO':>15s}" + ("" if close[-1] else "   apart")
        print(f"{seed:3d} {name:32s} {distances}{agree}", flush=True)
    real.close()
    tabletop.close()
    print(f"tcp and joints within {100 * CLOSE:.0f} cm in {sum(close)} of {trials} trials; "
          f"lights agree in {sum(lights)} of {trials}")
    return np.mean(close), np.mean(lights)


class Compared:
    """RealCalvin for an expert to act in; every frame is drawn by it and by calvin_env's own cameras."""

    def __init__(self, real):
        self.real = real
        self.pixels = {name: [] for name in real.cameras}   # that differ, frame by frame

    def reset(self, *start):
        return self._compared(self.real.reset(*start))

    def step(self, action):
        return self._compared(self.real.step(action, look=False))

    def _compared(self, obs):
        for name, picture in self.real._pictures().items():
            camera = self.real.cameras[name.removeprefix("rgb_")]
            different = (camera.render()[0] != picture).any(-1)
            if different.any():                             # drawn again, its own may differ by a shade
                different &= (camera.render()[0] != picture).any(-1)
            self.pixels[camera.name].append(int(different.sum()))
        return obs


def compare_pictures(root=None, tasks=tuple(cs.TASKS), plays=2, length=250):
    """Print how many pixels differ in each episode -> {camera: [number of pixels in each frame]}"""
    real = RealCalvin(root=root or os.environ.get("CALVIN_ENV_ROOT"))
    pixels = {name: [] for name in real.cameras}
    heads = [f"{name:>16s}" for name in pixels]
    print("pixels that differ, at most and a frame:  ", *heads, "   frames", sep="")
    for name, seed in [*((task, 0) for task in tasks), *(("play", seed) for seed in range(plays))]:
        sim = Compared(real)
        if name == "play":
            expert.play_episode(sim, seed, length)
        else:
            expert.demo_episode(sim, name, seed)
        counts = [f"{max(count):8d}{np.mean(count):8.3f}" for count in sim.pixels.values()]
        print(f"{name:42s}", *counts, f"{len(sim.pixels['static']):9d}", sep="", flush=True)
        for camera, count in sim.pixels.items():
            pixels[camera] += count
    real.close()
    return pixels


if __name__ == "__main__":
    if sys.argv[1:] == ["pictures"]:
        compare_pictures()
    else:
        main(*map(int, sys.argv[1:]))
