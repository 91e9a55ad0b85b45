"""Do the two simulators tell the same story?  The same start and the same 60 scripted actions in the built-in tabletop and in calvin_env.

    CALVIN_ENV_ROOT=path/to/calvin_env python tests/fidelity.py [trials] [steps]      prints what agrees, trial by trial

The expert acts in the tabletop; the real simulator is given the very same actions, open loop.
"""
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calvin_sim as cs                                                                    # noqa: E402
from support import expert                                                                 # noqa: E402
from support.calvin_real import RealCalvin                                                 # noqa: E402

CLOSE = 0.02       # m


def compare(real, tabletop, seed, steps=60):
    """One trial -> task, the largest distance of the TCP and of each of the four joints over all steps (m), do both lights agree at the end."""
    name, rng = list(cs.TASKS)[seed % len(cs.TASKS)], np.random.default_rng([seed, 4])
    start = cs.sample_start(name, rng)
    guide, here, there = expert.Expert(name, rng), [tabletop.reset(*start)], [real.reset(*start)]
    for _ in range(steps):
        action = guide.act(here[-1]["robot_obs"], here[-1]["scene_obs"])
        here.append(tabletop.step(action)), there.append(real.step(action))
    robot, scene = (np.stack([[obs[key] for obs in story] for story in (here, there)]).astype(float) for key in ("robot_obs", "scene_obs"))
    tcp = np.linalg.norm(robot[0, :, :3] - robot[1, :, :3], axis=-1).max()
    joints = np.abs(scene[0, :, :4] - scene[1, :, :4]).max(0)
    return name, tcp, joints, bool((scene[0, -1, 4:6] == scene[1, -1, 4:6]).all())


def main(trials=40, steps=60, root=None):
    """Print the table -> share of trials in which TCP and joints stay close, share in which the lights agree."""
    real = RealCalvin(render=False, root=root or os.environ.get("CALVIN_ENV_ROOT"))        # first: see RealCalvin
    tabletop, close, lights = cs.Tabletop(render=False), [], []
    print("largest distance over the trial, mm:   tcp  slider  drawer  button  switch   lights agree")
    for seed in range(trials):
        name, tcp, joints, same = compare(real, tabletop, seed, steps)
        close.append(max(tcp, *joints) < CLOSE)
        lights.append(same)
        print(f"{seed:3d} {name:32s} {1000 * tcp:7.1f}" + "".join(f"{1000 * j:8.1f}" for j in joints) + f"{'yes' if same else 'NO':>15s}"
              + ("" if close[-1] else "   apart"), flush=True)
    real.close()
    tabletop.close()
    print(f"tcp and joints within {100 * CLOSE:.0f} cm in {sum(close)} of {trials} trials; lights agree in {sum(lights)} of {trials}")
    return np.mean(close), np.mean(lights)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
