"""expert.py: the scripted expert, its demonstrations and its play; and the commands of calvin_sim.py."""
import argparse
import time
from typing import NamedTuple

import numpy as np

from calvin_sim import BULB, BUTTON, DRAWER, LED, MAX_REL_ORN, MAX_REL_POS, SLIDER, SWITCH, TASKS, TIP
from calvin_sim import Tabletop, advance_target, possible, sample_start, success
from support.calvin_real import RealCalvin
from support.files import InputError
from support.tabletop_model import euler_matrix

# ---- The scripted expert: sees robot_obs and scene_obs, says a relative action -----------------------------
class Waypoint(NamedTuple):
    x: float                 # of the fingertips, from the centre of the handle, m
    y: float
    z: float
    at: float = None         # the handle where its joint is here (None: where it is now)
    precise: bool = False    # wait until the tip is there; aim with little noise
    slow: float = 1.0        # speed relative to the attempt's pace


class Skill(NamedTuple):
    joint: int               # whose handle the waypoints refer to
    points: tuple
    leave: tuple             # how to get away afterwards, m
    opening: float = -1.0    # gripper command
    tilt: tuple = (0, 0, 0)  # of the tool from vertical: added to DOWN, rad
    along: float = 0.0       # spread of the contact point along the handle (+-, m)
    pace: tuple = (0.43, 0.75)   # speed range, as a share of the largest action


DOWN = np.array([np.pi, 0, np.pi / 2])                   # the tool vertical, fingers along x
UNIT = np.array([MAX_REL_POS] * 3 + [MAX_REL_ORN] * 3)
HANDLES = {  # joint -> centre of the handle at 0, direction of travel
    DRAWER: ((0.18, -0.2495, 0.36), (0, -1, 0)),
    SLIDER: ((0.04, 0.0, 0.545), (-1, 0, 0)),
    SWITCH: ((0.30, 0.0205, 0.527), (0, 0.5, 0.866)),
    BUTTON: ((-0.12, -0.12, 0.486), (0, 0, -1)),
}


def _slide(side, at):
    """Two ways to move the sliding door to one side (-1 left).

    Straddle the handle, or push it with closed fingers."""
    straddle = (
        Waypoint(0, -0.10, 0.03),
        Waypoint(0, 0.012, -0.004, precise=True),
        Waypoint(0.07 * side, 0.012, -0.004, at),
    )
    push = (
        Waypoint(-0.06 * side, -0.09, 0.03),
        Waypoint(-0.055 * side, 0.012, 0, precise=True),
        Waypoint(0, 0.012, 0, at),
    )
    return (
        Skill(SLIDER, straddle, (0, -0.12, 0.03), opening=1.0),
        Skill(SLIDER, push, (-0.03 * side, -0.10, 0.03)),
    )


def _press(x, opening):
    """Press the button and let go, with closed fingers or with one of two open ones."""
    points = (
        Waypoint(x, 0, 0.06),
        Waypoint(x, 0, -0.03, precise=True, slow=0.6),
        Waypoint(x, 0, 0.05),
    )
    return Skill(BUTTON, points, (0, -0.02, 0.12), opening=opening, pace=(0.25, 0.42))


_PULL = (
    Waypoint(0, 0.04, 0.11),
    Waypoint(0, 0.035, -0.004, precise=True, slow=0.8),
    Waypoint(0, 0, -0.006, at=0.23, slow=0.9),
)
_PUSH = (
    Waypoint(0, -0.07, 0.10),
    Waypoint(0, -0.05, -0.004, precise=True),
    Waypoint(0, -0.02, -0.004, at=-0.03),
)
_LEVER_UP = (
    Waypoint(0, -0.07, -0.03),
    Waypoint(0, -0.005, -0.034, precise=True),
    Waypoint(0, 0, 0, at=0.095),
)
_LEVER_DOWN = (
    Waypoint(0, -0.05, 0.06),
    Waypoint(0, 0.015, 0.045, precise=True),
    Waypoint(0, 0, 0, at=-0.02),
)
SKILLS = {  # task -> variants; the first is the commoner
    "open_drawer": [Skill(DRAWER, _PULL, (0, 0.03, 0.14), along=0.06)],
    "close_drawer": [Skill(DRAWER, _PUSH, (0, -0.06, 0.12), along=0.06)],
    "turn_on_lightbulb": [
        Skill(SWITCH, _LEVER_UP, (-0.02, -0.10, 0), tilt=(-0.25, -0.70, 0), along=0.035),
    ],
    "turn_off_lightbulb": [
        Skill(SWITCH, _LEVER_DOWN, (-0.02, -0.10, 0.03), tilt=(-0.30, -0.50, 0), along=0.035),
    ],
    "move_slider_left": _slide(-1, 0.28),
    "move_slider_right": _slide(1, 0.0),
    "turn_on_led": (_press(0, -1.0), _press(0.04, 1.0)),
    "turn_off_led": (_press(0, -1.0), _press(0.04, 1.0)),
}


def _difference(pose, other):
    """pose - other [6], angles wrapped to [-pi, pi]."""
    delta = pose - other
    delta[3:] = (delta[3:] + np.pi) % (2 * np.pi) - np.pi
    return delta


class Expert:
    """Follows noisy waypoints by relative actions: act(robot_obs [15], scene_obs [24]) -> action [7].

    It keeps the commanded pose itself, as the simulator does, so it can drive any simulator with CALVIN's
    actions.
    `error` (m) displaces the whole attempt, mostly to where the handle should go: a hand that arrives there
    cannot push it.  `haste` speeds it up, `touch` bounds the pace at the handle.
    """

    def __init__(self, task_name, rng, error=0.0, haste=1.0, touch=1.0):
        self.skill = SKILLS[TASKS[task_name].skill or task_name][0 if rng.random() < 0.65 else -1]
        travel = np.sign(TASKS[task_name].change) * np.array(HANDLES[self.skill.joint][1])
        beyond = travel * (self.skill.joint != BUTTON)   # a button has no beyond: it is missed on all sides
        direction = rng.normal(1.2 * beyond, (1.0, 0.8, 0.6))
        self.error = error * direction / np.linalg.norm(direction)
        self.rng = rng
        self.haste = haste
        self.touch = touch
        self.queue = []
        self.path = None
        self.noise = np.zeros(6)
        self.target = None
        self.plan()

    @property
    def done(self):
        return not self.queue and self.path is None

    def plan(self):
        """Queue the waypoints of one attempt, with the variety of one person on one occasion."""
        rng = self.rng
        skill = self.skill
        self.pace = min(rng.uniform(*skill.pace) * self.haste, 0.95)
        self.shift = self.error + rng.normal(0, 0.004, 3) + (rng.uniform(-skill.along, skill.along), 0, 0)
        self.tilt = np.array(skill.tilt) + rng.normal(0, (0.05, 0.05, 0.10))
        for point in skill.points:
            if point.precise and rng.random() < 0.3 / self.haste:     # come near first, then correct
                self.queue.append((point._replace(precise=False), rng.normal((0, 0, 0.015), 0.012)))
            spread = 0.012 if point.at is None else 0.005
            if point.precise:
                spread = 0.002
            self.queue.append((point, rng.normal(0, spread, 3)))

    def retreat(self, wander=0):
        """Drop the plan and move away from the handle, then perhaps about the room without aim."""
        self.queue = [(None, np.array(self.skill.leave) + self.rng.normal(0, 0.02, 3))]
        self.path = None
        self.queue += [(None, self.rng.normal(0, (0.12, 0.10, 0.06))) for _ in range(wander)]

    def skip_ahead(self, robot_obs, scene_obs):
        """Drop the waypoints before the one where the arm already is: it may start at the handle."""
        goals = [self._goal(*step, robot_obs, scene_obs) for step in self.queue[:-1]]
        away = [np.linalg.norm(goal[:3] - robot_obs[:3]) for goal in goals]
        self.queue = self.queue[max([i for i, distance in enumerate(away) if distance < 0.035], default=0):]

    def _goal(self, point, noise, robot_obs, scene_obs):
        euler = DOWN + self.tilt
        if point is None:                                # relative to where the arm is
            return np.concatenate([robot_obs[:3] + noise, euler])
        centre, travel = HANDLES[self.skill.joint]
        joint = scene_obs[self.skill.joint] if point.at is None else point.at
        tip = np.array(centre) + np.array(travel) * joint + np.array(point[:3]) + self.shift + noise
        return np.concatenate([tip - TIP * euler_matrix(euler)[:, 2], euler])

    def _next_path(self, robot_obs, scene_obs):
        rng = self.rng
        point, noise = self.queue.pop(0)
        goal = self._goal(point, noise, robot_obs, scene_obs)
        delta = _difference(goal, self.target)
        precise = point is not None and point.precise
        contact = point is not None and point.at is not None
        pace = self.pace * (point.slow if point else 1.0)
        if contact:                                      # a hurried arm slips off the handle
            pace = min(pace, 0.65 if self.skill.joint == SLIDER else 0.8)
        if precise or contact:                # play hurries through the room, not always at the handle
            pace = min(pace, self.touch)
        steps = max(np.linalg.norm(delta[:3]) / MAX_REL_POS, np.abs(delta[3:]).max() / MAX_REL_ORN) / pace
        bow = rng.normal(0, 0.16, 3) * np.linalg.norm(delta[:3]) * (0.3 if contact else 1.0)
        pause = rng.integers(3, 11) if rng.random() < 0.22 / self.haste ** 2 else 0
        self.path = dict(
            start=self.target.copy(),
            delta=delta,
            bow=np.append(bow, np.zeros(3)),
            steps=max(steps, 2.0),
            t=0,
            last=int(steps) + 1 + pause,
            wait=10 if precise else 0,
        )

    def act(self, robot_obs, scene_obs):
        """robot_obs [15], scene_obs [24] -> relative action [7] in [-1, 1].

        Holds still once the plan is done."""
        tcp = np.asarray(robot_obs[:6], float)
        if self.target is None:
            self.target = tcp.copy()
        if self.path is None and self.queue:
            self._next_path(robot_obs, scene_obs)
        self.noise = 0.8 * self.noise + self.rng.normal(0, 0.05, 6)      # smooth: a hand, not a dice
        wish = self.noise
        if path := self.path:
            path["t"] += 1
            share = min(path["t"] / path["steps"], 1.0)
            ease = 0.6 * share + 0.4 * share * share * (3 - 2 * share)
            there = path["start"] + path["delta"] * ease + path["bow"] * np.sin(np.pi * ease)
            wish = wish + _difference(there, self.target) / UNIT
            off = np.abs(path["start"] + path["delta"] - tcp)[:3].max()
            patience = path["wait"] if off > 0.006 + 0.002 * self.haste else 0
            if path["t"] >= path["last"] + patience:
                self.path = None
        action = np.append(wish, self.skill.opening).clip(-1, 1).astype(np.float32)
        self.target = advance_target(self.target, action.astype(float), tcp)
        return action


class _Recorder:
    """Lets experts act in a simulator and keeps the frames, each with the action executed at it."""

    def __init__(self, sim, start):
        self.sim = sim
        self.obs = sim.reset(*start)
        self.frames = {}
        self.length = 0

    def step(self, expert):
        action = expert.act(self.obs["robot_obs"], self.obs["scene_obs"])
        for key, value in {**self.obs, "rel_actions": action}.items():
            self.frames.setdefault(key, []).append(value)
        self.obs = self.sim.step(action)
        self.length += 1
        return self.obs["scene_obs"]

    def episode(self):
        return {key: np.stack(values) for key, values in self.frames.items()}


def demo_episode(sim, task_name, seed, max_steps=120):
    """One demonstration from a random start -> (episode of arrays [T, ...], solved).

    A function of the seed alone."""
    rng = np.random.default_rng([seed, list(TASKS).index(task_name), 1])
    recorder = _Recorder(sim, sample_start(task_name, rng))
    expert = Expert(task_name, rng)
    last = None
    start = recorder.obs["scene_obs"]
    while recorder.length < max_steps and recorder.length != last:
        scene = recorder.step(expert)
        if last is None and success(task_name, start, scene):
            # a while longer, as a person would: success is more than one moment
            last = recorder.length + rng.integers(8, 17)
        elif last is None and expert.done:               # a person who sees that it failed tries again
            expert.plan()
    return recorder.episode(), last is not None


def _next_task(scene, last, rng, tasks):
    """What a playing person tries next: often the same thing back again, seldom what cannot work."""
    options = tasks
    draw = rng.random()
    if draw < 0.96:
        options = [name for name in tasks if possible(name, scene)] or tasks
    if draw < 0.45 and last is not None:
        options = [name for name in options if TASKS[name].index == TASKS[last].index] or options
    likings = {LED: 2.0, BULB: 2.2, SLIDER: 2.0, DRAWER: 1.2}
    liking = np.array([likings[TASKS[name].index] for name in options])
    return options[rng.choice(len(options), p=liking / liking.sum())]


def play_episode(sim, seed, length, tasks=tuple(TASKS)):
    """`length` frames of play, half of the attempts near misses or misses -> episode of arrays [length, ...].

    A function of the seed and of the tasks that are tried."""
    rng = np.random.default_rng([seed, 0, 2])
    name = None
    recorder = _Recorder(sim, sample_start(tasks[rng.integers(len(tasks))], rng))
    while recorder.length < length:
        before = recorder.obs["scene_obs"]
        name = _next_task(before, name, rng, tasks)
        error = rng.uniform(0.01, 0.12) if rng.random() < 0.5 else 0.0
        expert = Expert(name, rng, error, haste=rng.uniform(1.4, 2.8), touch=rng.uniform(0.4, 0.95))
        expert.skip_ahead(recorder.obs["robot_obs"], before)
        patience = int(rng.integers(5, 30)) if rng.random() < 0.08 else 60
        while recorder.length < length and not expert.done and patience > 0:
            patience -= 1
            if success(name, before, recorder.step(expert)):
                patience = min(patience, int(rng.integers(0, 5)))
        if expert.skill.joint == DRAWER or rng.random() < 0.35:
            expert.retreat(wander=int(rng.integers(1, 3)) if rng.random() < 0.12 else 0)
            while recorder.length < length and not expert.done:
                recorder.step(expert)
    return recorder.episode()


# ---- Command line ------------------------------------------------------------------------------------------
def check(sim, names, n):
    """Print how often and how fast the expert solves each task."""
    print(f"{'task':20s} solved   steps to success: min median max   under 72")
    for name in names:
        lengths = []
        for seed in range(n):
            episode, solved = demo_episode(sim, name, seed)
            done = success(name, episode["scene_obs"][0], episode["scene_obs"])
            if solved:
                lengths.append(np.append(done, True).argmax())
        text = ""
        if lengths:
            fast = np.mean(np.array(lengths) < 72)
            text = f"{min(lengths):21d} {np.median(lengths):6.1f} {max(lengths):3d} {fast:9.2f}"
        print(f"{name:20s} {len(lengths):3d}/{n:<3d} {text}", flush=True)


def play_stats(steps):
    """Print events per 1,000 play steps, and steps per second with both pictures."""
    sim = Tabletop()
    wall = time.perf_counter()
    cpu = time.process_time()
    scenes = [play_episode(sim, seed, 1000)["scene_obs"] for seed in range(max(1, steps // 1000))]
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    for name, task in TASKS.items():
        count = 0
        for values in scenes:                # an event: the predicate holds since the last opposite extreme
            lowest = np.inf
            for value in values[:, task.index] * np.sign(task.change):
                lowest = min(lowest, value)
                if value - lowest > abs(task.change):
                    count += 1
                    lowest = value
        print(f"{name:20s} {count / len(scenes):5.1f} per 1,000 steps")
    rates = [1000 * len(scenes) / seconds for seconds in (wall, cpu)]
    print("{:.0f} steps/s, {:.0f} per CPU second, both pictures".format(*rates))


def view(out):
    """Write a contact sheet: each row one task, frames of an expert episode, static over gripper camera."""
    import imageio.v2 as imageio
    sim = Tabletop(128)
    rows = []
    for name in TASKS:
        episode = demo_episode(sim, name, 0)[0]
        picks = np.linspace(0, len(episode["rel_actions"]) - 1, 8).astype(int)
        rows += [np.concatenate(episode[key][picks], 1) for key in ("rgb_static", "rgb_gripper")]
    imageio.imwrite(out, np.concatenate(rows, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=("check", "play-stats", "view"))
    add("--task", default="all", choices=("all", *TASKS), help="what to check")
    add("--n", type=int, default=100, help="random starts to check a task from")
    add("--steps", type=int, default=5000, help="steps of play to count events in")
    add("--out", default="view.png", help="where view writes its picture")
    simulators = ("tabletop", "calvin")
    add("--sim", default="tabletop", choices=simulators, help="the simulator to check the expert in")
    add("--calvin-root", "--calvin_root", default="calvin_env", help="the clone of calvin_env")
    args = parser.parse_args()
    if args.command == "check":
        try:
            if args.sim == "tabletop":
                sim = Tabletop(render=False)
            else:
                sim = RealCalvin(render=False, root=args.calvin_root)
        except InputError as error:
            parser.exit(2, f"calvin_sim: {error}\n")
        check(sim, list(TASKS) if args.task == "all" else [args.task], args.n)
    elif args.command == "play-stats":
        play_stats(args.steps)
    else:
        view(args.out)
