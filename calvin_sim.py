"""A small CALVIN-D tabletop in PyBullet: eight tasks, two cameras, a scripted expert and play.

    python calvin_sim.py check [--task open_drawer] [--n 100]     success and steps of the scripted expert
    python calvin_sim.py check --sim calvin --calvin-root PATH    the same in the real simulator, see calvin_real.py
    python calvin_sim.py play-stats [--steps 5000]                events per 1,000 play steps, steps per second
    python calvin_sim.py view [--out view.png]                    one contact sheet of both cameras

A Franka Panda stands at a desk with a drawer, a sliding door, a lever that lights a bulb, a button that toggles an LED
and three loose blocks, at the poses, axes, limits and thresholds measured in the real CALVIN simulator (scene D).
World frame: x right, y into the desk, z up; metres, radians, extrinsic xyz Euler angles (roll, pitch, yaw).

    robot_obs [15]  0-2 tcp position, 3-5 tcp Euler, 6 gripper opening (m), 7-13 arm joints, 14 last gripper command (+-1)
    scene_obs [24]  0 slider, 1 drawer, 2 button, 3 switch (joint, m), 4 bulb, 5 LED (0/1),
                    6-11 / 12-17 / 18-23 red / blue / pink block: position, Euler
    action    [7]   dx dy dz (x 0.02 m), droll dpitch dyaw (x 0.05 rad), gripper (>= 0 opens), all in [-1, 1], 30 Hz

Departures from CALVIN: plain colours and low-polygon links (a step with both pictures is 20 times faster); the target
pose may lead the measured one by WINDUP_* at most; an episode depends on its start and its actions only.
"""
import argparse
import contextlib
import functools
import itertools
import os
import re
import struct
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


@contextlib.contextmanager
def muted(descriptor):
    """Send nowhere what C code writes to a file descriptor (1 stdout, 2 stderr), unless it is closed."""
    try:
        keep = os.dup(descriptor)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(keep, descriptor)
        os.close(keep)


with muted(2):                               # it greets every program and worker with its build time
    import pybullet as pb
    import pybullet_data

MAX_REL_POS, MAX_REL_ORN = 0.02, 0.05        # what an action of 1 moves the target: m, rad
WINDUP_POS, WINDUP_ORN = 0.06, 0.15          # how far the target may lead the measured tcp, per component: m, rad
ROBOT_BASE = (-0.34, -0.46, 0.24)
HOME = np.array([-1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534])  # CALVIN's default arm joints, rad
HOME_TCP = np.array([0.0259, -0.2313, 0.5713])
TCP_OFFSET, TIP = 0.14, 0.0157               # tcp beyond the hand frame, fingertips beyond the tcp, along the tool: m
ARM, FINGERS, HAND_LINK, TCP_LINK = tuple(range(7)), (9, 10), 8, 11
JOINT_LOW = np.array([-2.9671, -1.8326, -2.9671, -3.1416, -2.9671, -0.0873, -2.9671])
JOINT_HIGH = np.array([2.9671, 1.8326, 2.9671, 0.0, 2.9671, 3.8223, 2.9671])
SLIDER, DRAWER, BUTTON, SWITCH, BULB, LED = range(6)     # places in scene_obs
SUBSTEPS = 8                                 # of 1/240 s; PyBullet gives each the impulse of a whole step: forces are divided
BULB_AT, LED_AT = 0.044, 0.010               # joint thresholds of the two lamps, m
LIMITS = (0.28, 0.22, 0.02, 0.088)           # travel of slider, drawer, button, switch, m


# ---- Tasks: CALVIN's predicates and start states, pure functions of the scene state ----------------------------------
class Task(NamedTuple):
    name: str
    index: int           # the scene_obs entry that the task changes
    change: float        # fulfilled when that entry has changed by more than this in this direction
    phrase: str


TASKS = {t.name: t for t in (
    Task("open_drawer", DRAWER, 0.12, "pull the handle to open the drawer"),
    Task("close_drawer", DRAWER, -0.12, "push the handle to close the drawer"),
    Task("move_slider_left", SLIDER, 0.15, "push the sliding door to the left side"),
    Task("move_slider_right", SLIDER, -0.15, "push the sliding door to the right side"),
    Task("turn_on_lightbulb", BULB, 0.5, "use the switch to turn on the light bulb"),
    Task("turn_off_lightbulb", BULB, -0.5, "use the switch to turn off the light bulb"),
    Task("turn_on_led", LED, 0.5, "press the button to turn on the LED"),
    Task("turn_off_led", LED, -0.5, "press the button to turn off the LED"))}


def success(task_name, scene_start, scene_now):
    """CALVIN's predicate: scene_start, scene_now [..., 24] -> bool [...]. Momentary; strict, as in CALVIN."""
    task = TASKS[task_name]
    moved = (np.asarray(scene_now)[..., task.index] - np.asarray(scene_start)[..., task.index]) * np.sign(task.change)
    return moved > abs(task.change)


def possible(task_name, scene):
    """scene [..., 24] -> bool [...]: is there room for the change that the task asks for?"""
    task = TASKS[task_name]
    goal = np.asarray(scene)[..., task.index] + task.change
    return (0 < goal) & (goal < (*LIMITS, 1, 1)[task.index])


def sample_start(task_name, rng):
    """Draw (robot_obs [15], scene_obs [24]) in which `task_name` is yet to be done; everything else is random."""
    task, scene = TASKS[task_name], np.zeros(24, np.float32)
    far = rng.random(6) < 0.5                            # which fixtures are left / open / up / lit
    far[task.index] = task.change < 0
    far[SWITCH] = far[BULB]
    for joint, (near, away) in {SLIDER: (0.06, 0.22), DRAWER: (0.03, 0.17), SWITCH: (0.02, 0.07)}.items():
        scene[joint] = rng.uniform(away, LIMITS[joint]) if far[joint] else rng.uniform(0, near)
    scene[BULB], scene[LED] = far[BULB], far[LED]
    surfaces = ((0.0, 0.35, -0.15, -0.03), (-0.32, -0.16, 0.05, 0.12), (-0.05, 0.13, 0.05, 0.12))
    centres = []
    while len(centres) < 3:                              # 0.1 m apart: the longest block has a half diagonal of 0.045
        x0, x1, y0, y1 = surfaces[rng.choice(3, p=(0.6, 0.2, 0.2))]
        centre = np.array([rng.uniform(x0, x1), rng.uniform(y0, y1)])
        if all(np.linalg.norm(centre - other) > 0.1 for other in centres):
            scene[6 + 6 * len(centres):12 + 6 * len(centres)] = (*centre, 0.46, 0, 0, rng.uniform(0, np.pi))
            centres.append(centre)
    return sample_robot(rng), scene


def sample_robot(rng):
    """Draw a robot_obs [15] anywhere above the desk's front, tilted by up to 21 degrees: an official start is where the last skill left the arm."""
    while True:
        joints = HOME + rng.uniform(-0.45, 0.45, 7)
        tcp, axis = forward_kinematics(joints)
        if -0.27 < tcp[0] < 0.33 and -0.46 < tcp[1] < -0.08 and 0.525 < tcp[2] < 0.70 and axis[2] < -0.93:
            opening = 0.08 if rng.random() < 0.5 else 0.0
            return np.concatenate([tcp, [opening], joints, [1.0 if opening else -1.0]]).astype(np.float32)


def checked_start(robot_obs, scene_obs, seed):
    """What a simulator's reset was given -> finite robot_obs [15], scene_obs [24] as new f64 arrays; None is drawn from `seed`."""
    drawn = sample_start("open_drawer", np.random.default_rng(seed))
    robot, scene = (np.array(d if o is None else o, float) for o, d in zip((robot_obs, scene_obs), drawn))
    if robot.shape != (15,) or scene.shape != (24,) or not np.isfinite([*robot, *scene]).all():
        raise ValueError(f"reset needs finite robot_obs [15] and scene_obs [24], got {robot} and {scene}.")
    return robot, scene


def checked_action(action):
    """-> action [7] f64. A NaN must not get further: it would hang calvin_env for ever, without a word."""
    action = np.asarray(action, float)
    if action.shape != (7,) or not (np.abs(action) <= 1 + 1e-3).all():
        raise ValueError(f"an action is 7 finite numbers in [-1, 1], got {action}.")
    return action


# ---- Geometry of rotations and of the arm ----------------------------------------------------------------------------
def euler_matrix(euler):
    """Extrinsic xyz Euler angles [3] -> rotation matrix [3, 3]."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(euler), np.sin(euler)
    return np.array([[cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                     [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                     [-sp, cp * sr, cp * cr]])


# Panda joint frames in their parents: Euler angles, then position (from its URDF)
PANDA = (((0, 0, 0), (0, 0, 0.333)), ((-1, 0, 0), (0, 0, 0)), ((1, 0, 0), (0, -0.316, 0)), ((1, 0, 0), (0.0825, 0, 0)),
         ((-1, 0, 0), (-0.0825, 0.384, 0)), ((1, 0, 0), (0, 0, 0)), ((1, 0, 0), (0.088, 0, 0)))


def forward_kinematics(joints):
    """Arm joints [7] -> (tcp pose [6], tool axis [3]). Lets start states be drawn without a simulator."""
    position, rotation = np.array(ROBOT_BASE, float), np.eye(3)
    for (turn, offset), q in zip(PANDA, joints):
        position = position + rotation @ np.array(offset)
        rotation = rotation @ euler_matrix(np.array(turn) * np.pi / 2) @ euler_matrix(np.array([0, 0, q]))
    rotation = rotation @ euler_matrix(np.array([0, 0, -np.pi / 4]))       # the hand is mounted at -45 degrees
    position = position + rotation[:, 2] * (0.107 + TCP_OFFSET)
    roll, yaw = np.arctan2(rotation[2, 1], rotation[2, 2]), np.arctan2(rotation[1, 0], rotation[0, 0])
    return np.array([*position, roll, -np.arcsin(rotation[2, 0]), yaw]), rotation[:, 2]


def advance_target(target, action, tcp, keep=1):
    """The commanded pose after one action, as the simulator and the dream both integrate it.

    target [..., 6] commanded pose, action [..., >= 6] in [-1, 1], tcp [..., 6] measured pose -> target [..., 6].
    keep: 0 forgets the lead that target had over tcp, 1 does not. Angles are wrapped; the lead over tcp is clamped per component, so that a blocked arm does not wind up. Numpy or torch.
    """
    lead = keep * (target - tcp)
    lead[..., 3:] = (lead[..., 3:] + np.pi) % (2 * np.pi) - np.pi
    lead[..., :3] = (lead[..., :3] + action[..., :3] * MAX_REL_POS).clip(-WINDUP_POS, WINDUP_POS)
    lead[..., 3:] = (lead[..., 3:] + action[..., 3:6] * MAX_REL_ORN).clip(-WINDUP_ORN, WINDUP_ORN)
    return tcp + lead


# ---- The desk and the arm as generated URDF text: few triangles, because the software renderer pays for each ---------
WOOD, DARK_WOOD, PALE_WOOD, INSIDE = (0.66, 0.47, 0.29), (0.46, 0.31, 0.19), (0.78, 0.60, 0.40), (0.30, 0.20, 0.13)
LEGS, DRAWER_GRIP, SLIDER_GRIP, SWITCH_GRIP = (0.40, 0.27, 0.17), (0.22, 0.22, 0.25), (0.16, 0.25, 0.45), (0.45, 0.1, 0.4)
BLACK, GREEN, YELLOW, LAMP_OFF = (0.05, 0.05, 0.05), (0.0, 0.9, 0.1), (1.0, 0.9, 0.0), (0.97, 0.97, 0.97)
RED, BLUE, PINK = (0.9, 0.05, 0.05), (0.05, 0.1, 0.9), (1.0, 0.35, 0.75)
BLOCKS = (((0.056, 0.04, 0.04), RED), ((0.04, 0.04, 0.04), BLUE), ((0.08, 0.04, 0.04), PINK))     # size, colour
CORNERS = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
FLAT, TILTED = (0, 0, 0), (-np.pi / 6, 0, 0)             # the cabinet's front leans back by 30 degrees


def panel(x0, x1, n0, n1, u0, u1):
    """A box on the tilted cabinet front: across (x), out of the panel (n), up along it (u) -> centre, size, rpy."""
    n, u = (n0 + n1) / 2, (u0 + u1) / 2
    centre = ((x0 + x1) / 2, 0.0212 - 0.866 * n + 0.5 * u, 0.487 + 0.5 * n + 0.866 * u)
    return centre, (x1 - x0, n1 - n0, u1 - u0), TILTED


def box(x0, x1, y0, y1, z0, z1):
    return ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2), (x1 - x0, y1 - y0, z1 - z0), FLAT


# link -> colour -> boxes, everything at joint position 0
DESK = {
    "desk": {WOOD: [box(-0.44, 0.44, -0.18, 0.18, 0.40, 0.44), panel(-0.44, -0.36, -0.02, 0, -0.054, 0.165)],
             INSIDE: [box(-0.44, 0.44, 0.16, 0.18, 0.44, 0.63)], DARK_WOOD: [box(-0.44, 0.44, 0.11, 0.18, 0.63, 0.649)],
             PALE_WOOD: [panel(0.16, 0.44, -0.02, 0, -0.054, 0.165)],
             LEGS: [box(-0.42, -0.36, -0.16, 0.16, 0, 0.40), box(0.38, 0.44, -0.16, 0.16, 0, 0.40)]},
    "slider": {DARK_WOOD: [panel(-0.08, 0.16, -0.02, 0, -0.05, 0.165)],
               SLIDER_GRIP: [panel(0.019, 0.061, 0, 0.045, -0.012, 0.012), panel(0.019, 0.061, 0, 0.045, 0.153, 0.177),
                             panel(0.019, 0.061, 0.033, 0.059, -0.012, 0.177)]},
    "drawer": {PALE_WOOD: [box(0, 0.36, -0.182, -0.157, 0.30, 0.395)], WOOD: [box(0.02, 0.34, -0.157, 0.10, 0.31, 0.32)],
               DARK_WOOD: [box(0, 0.02, -0.157, 0.10, 0.31, 0.38), box(0.34, 0.36, -0.157, 0.10, 0.31, 0.38)],
               DRAWER_GRIP: [box(0.06, 0.30, -0.261, -0.238, 0.34, 0.38), box(0.06, 0.084, -0.238, -0.182, 0.34, 0.38),
                             box(0.276, 0.30, -0.238, -0.182, 0.34, 0.38)]},
    "button": {BLACK: [box(-0.152, -0.088, -0.152, -0.088, 0.452, 0.486)]},
    "switch": {SWITCH_GRIP: [panel(0.24, 0.36, 0.010, 0.031, 0.02, 0.049), panel(0.24, 0.255, 0, 0.010, 0.02, 0.049),
                             panel(0.345, 0.36, 0, 0.010, 0.02, 0.049)]},
    "led": {LAMP_OFF: [box(-0.203, -0.037, 0.137, 0.183, 0.645, 0.670)]},
    "bulb": {LAMP_OFF: [box(0.269, 0.331, 0.129, 0.191, 0.645, 0.700)]}}
JOINTS = {"slider": ((-1, 0, 0), 1.54, 0.28), "drawer": ((0, -1, 0), 4.23, 0.22), "button": ((0, 0, -1), 0.15, 0.02),
          "switch": ((0, 0.5, 0.866), 0.24, 0.088)}     # axis, mass (kg), travel (m); in the order of scene_obs


def unit_normal(normal):
    """About normal / |normal|, of float32 length exactly 1: the renderer normalises in place with every picture, and any
    other length would flip the last bit each time, and with it a pixel now and then."""
    rng = np.random.default_rng(0)
    while True:
        unit = (normal / np.linalg.norm(normal)).astype(np.float32)
        if all((a * a + b * b) + c * c == 1 for a, b, c in itertools.permutations(unit)):
            return unit
        normal = unit + rng.normal(0, 1e-4, 3)


def hulls_obj(clouds, corners=14):
    """OBJ text of convex meshes, one for each cloud of points [N, 3]; of large ones only the extremes in a few directions."""
    directions, text, count, faces = np.random.default_rng(0).normal(size=(3, corners)), "", 1, 0
    for points in clouds:
        points = np.unique(points[(points @ directions).argmax(0)], axis=0) if len(points) > corners else points
        points = points + 1e-6 * np.sin(np.arange(points.size)).reshape(-1, 3)      # no four in a plane: no face twice
        text += "".join("v {:.7f} {:.7f} {:.7f}\n".format(*v) for v in points)
        triples = np.array([t for t in itertools.permutations(range(len(points)), 3) if t[0] == min(t)])
        a, b, c = points[triples].transpose(1, 0, 2)                       # [N, 3] each
        normals = np.cross(b - a, c - a)
        above = ((points - a[:, None]) * normals[:, None]).sum(-1).max(1)  # a face is a triple with no point above it
        for triple, normal in zip(triples[above < 1e-12], normals[above < 1e-12]):
            faces += 1
            text += "vn {:.9g} {:.9g} {:.9g}\nf ".format(*unit_normal(normal))
            text += " ".join(f"{v + count}//{faces}" for v in triple) + "\n"
        count += len(points)
    return text


def desk_urdf():
    """The desk: a fixed base, four sliding joints, two lamps. -> {file name: text} of its URDF and meshes."""
    text, files = "<robot name='desk'>", {}
    for name, parts in DESK.items():
        axis, mass, upper = JOINTS.get(name, (None, 0, 0))
        text += f"<link name='{name}'><contact><lateral_friction value='0.5'/></contact><inertial><mass value='{mass}'/>"
        text += "<inertia ixx='.01' iyy='.01' izz='.01' ixy='0' ixz='0' iyz='0'/></inertial>"
        for number, (colour, boxes) in enumerate(parts.items()):
            corners = [CORNERS * size @ euler_matrix(np.array(rpy)).T + centre for centre, size, rpy in boxes]
            files[f"{name}{number}.obj"] = hulls_obj(corners)
            text += f"<visual><geometry><mesh filename='{name}{number}.obj'/></geometry><material name='{name}{number}'>"
            text += "<color rgba='{} {} {} 1'/></material></visual>".format(*colour)
        for centre, size, rpy in itertools.chain(*parts.values()):
            text += "<collision><origin xyz='{} {} {}' rpy='{} {} {}'/>".format(*centre, *rpy)
            text += "<geometry><box size='{} {} {}'/></geometry></collision>".format(*size)
        text += "</link>"
        if name != "desk":
            text += "<joint name='{0}' type='{1}'><parent link='desk'/><child link='{0}'/><axis xyz='{2} {3} {4}'/>".format(
                name, "prismatic" if axis else "fixed", *(axis or (0, 0, 1)))
            text += f"<limit lower='0' upper='{upper}' effort='100' velocity='10'/></joint>"
    return {**files, "desk.urdf": text + "</robot>"}


def panda_urdf():
    """A low-polygon Panda with CALVIN's long fingers. -> {file name: text} of its URDF and meshes."""
    source, files = Path(pybullet_data.getDataPath(), "franka_panda"), {}
    text = (source / "panda.urdf").read_text()
    for mesh in set(re.findall(r"meshes/collision/(\w+)\.obj", text)):
        lines = (source / "meshes" / "collision" / (mesh + ".obj")).read_text().splitlines()
        points = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], float)
        if mesh == "finger":                             # a wedge 0.097 m long, inner face at y = 0: half width, y, z
            profile = ((0.011, 0, 0), (0.011, 0.030, 0.0085), (0.011, 0.020, 0.0465), (0.0105, 0.010, 0.0885), (0.006, 0.005, 0.0973), (0.0085, 0, 0.092))
            points = np.array([(x * side, y, z) for x, y, z in profile for side in (-1, 1)])
        files[mesh + ".obj"] = hulls_obj([points])
    text = re.sub(r"package://meshes/\w+/(\w+)\.obj", r"\1.obj", text)
    # only the wrist, the hand and the fingers can touch the desk; the upper arm never reaches it
    for link in range(5):
        text = re.sub(rf"(<link name=\"panda_link{link}\">.*?)<collision>.*?</collision>", r"\1", text, flags=re.S)
    for link in range(3):                                # no camera ever sees the base
        text = re.sub(rf"(<link name=\"panda_link{link}\">.*?)<visual>.*?</visual>", r"\1", text, flags=re.S)
    text = text.replace('xyz="0 0 0.105"', f'xyz="0 0 {TCP_OFFSET}"')     # its "grasptarget" becomes the tcp
    return {**files, "panda.urdf": text}


@functools.cache
def urdf_files():
    return {**panda_urdf(), **desk_urdf()}


# ---- The simulator ---------------------------------------------------------------------------------------------------
STATIC_VIEW = pb.computeViewMatrix((2.8715, -2.1666, 2.5552), (-0.02624, -0.03023, 0.3920), (0.40414, 0.22630, 0.88626))
STATIC_LENS, GRIPPER_LENS = pb.computeProjectionMatrixFOV(10, 1, 0.01, 10), pb.computeProjectionMatrixFOV(75, 1, 0.01, 2)
GRIPPER_CAM = euler_matrix(np.array([1.3, 0, -1.57]))    # in the hand frame, 0.1 m behind it; looks along its y, up is -z


def take_picture(client, size, view, lens):
    """-> picture [size, size] u32 (RGBA), depth [size, size] f32 (nonlinear)"""
    picture, depth = pb.getCameraImage(size, size, view, lens, shadow=0, flags=pb.ER_NO_SEGMENTATION_MASK,
                                       renderer=pb.ER_TINY_RENDERER, physicsClientId=client)[2:4]
    if isinstance(picture, tuple):           # PyBullet built without NumPy; nothing is quicker than these two
        picture, depth = bytearray(picture), struct.pack(f"{len(depth)}f", *depth)
    shape = size, size
    return np.frombuffer(picture, np.uint32).reshape(shape), np.frombuffer(depth, np.float32).reshape(shape)


def colours(picture):
    """u32 RGBA [S, S] -> u8 [S, S, 3]; channel by channel is four times faster than one strided copy"""
    return np.stack([picture.view(np.uint8)[:, i::4] for i in range(3)], -1)


class Tabletop:
    """The desk, the arm and two cameras. One control step is 1/30 s."""

    def __init__(self, image_size=64, render=True):
        self.image_size, self.render, self.client = image_size, render, None
        self._build()
        self._sort_shapes()
        self.reset(seed=0)

    def _build(self):
        """A new world. What Bullet keeps of an old one (the order of its contacts) would tell in the last digits of one episode in a hundred."""
        self.close()
        self.client, self.lamps = pb.connect(pb.DIRECT), [None, None]
        self._load()
        self._configure()

    def _load(self):
        c = dict(physicsClientId=self.client)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in urdf_files().items():
                Path(folder, name).write_text(text)
            urdf = dict(useFixedBase=True, flags=pb.URDF_USE_INERTIA_FROM_FILE, **c)
            self.robot, self.blocks = pb.loadURDF(f"{folder}/panda.urdf", ROBOT_BASE, **urdf), []
            for size, colour in BLOCKS:                  # what stands in front comes first: what it hides is not shaded
                half = [s / 2 for s in size]
                look = pb.createVisualShape(pb.GEOM_BOX, halfExtents=half, rgbaColor=(*colour, 1), **c)
                shape = pb.createCollisionShape(pb.GEOM_BOX, halfExtents=half, **c)
                self.blocks.append(pb.createMultiBody(1.0, shape, look, (0, 0, 1), **c))
                pb.changeDynamics(self.blocks[-1], -1, lateralFriction=0.7,
                                  activationState=pb.ACTIVATION_STATE_ENABLE_SLEEPING, **c)
            self.desk = pb.loadURDF(f"{folder}/desk.urdf", **urdf)
        floor = pb.createCollisionShape(pb.GEOM_BOX, halfExtents=(3, 3, 0.1), **c)     # a block may fall; not drawn: slow
        pb.changeVisualShape(pb.createMultiBody(0, floor, -1, (0, 0, -0.1), **c), -1, rgbaColor=(0, 0, 0, 0), **c)
        names = [pb.getJointInfo(self.desk, i, **c)[1].decode() for i in range(6)]
        self.fixtures, self.lamp_links = [names.index(name) for name in JOINTS], [names.index("bulb"), names.index("led")]

    def _configure(self):
        c = dict(physicsClientId=self.client)
        pb.setGravity(0, 0, -9.8, **c)
        pb.setPhysicsEngineParameter(fixedTimeStep=1 / 30, numSubSteps=SUBSTEPS, numSolverIterations=20,
                                     solverResidualThreshold=1e-7, minimumSolverIslandSize=1, **c)
        pb.setPhysicsEngineParameter(deterministicOverlappingPairs=1, **c)     # the order of contacts: not as history had it
        for body in (self.robot, self.desk):
            for joint in range(pb.getNumJoints(body, **c)):
                pb.changeDynamics(body, joint, linearDamping=0, angularDamping=0, jointDamping=0, **c)
        ends = (self.robot, FINGERS[0], self.robot, FINGERS[1])
        gear = pb.createConstraint(*ends, pb.JOINT_GEAR, (1, 0, 0), (0, 0, 0), (0, 0, 0), **c)
        pb.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50 / SUBSTEPS, **c)
        for joint in self.fixtures:
            pb.setJointMotorControl2(self.desk, joint, pb.VELOCITY_CONTROL, targetVelocity=0, force=4 / SUBSTEPS, **c)
        pb.setJointMotorControl2(self.desk, self.fixtures[BUTTON], pb.POSITION_CONTROL, targetPosition=0, force=4 / SUBSTEPS, **c)

    def _sort_shapes(self):
        """List the drawn shapes, and draw the fixed desk for the fixed camera."""
        shapes, index = [], {}
        for body in (self.robot, self.desk, *self.blocks):
            for data in pb.getVisualShapeData(body, physicsClientId=self.client):
                index[data[:2]] = index.get(data[:2], -1) + 1
                shapes.append((body, data[1], index[data[:2]], data[7][:3]))
        self.scenery = [shape for shape in shapes if shape[:2] == (self.desk, -1)]
        self.behind = [shape for shape in shapes if shape[0] == self.robot and shape[1] < HAND_LINK - 1]
        self.behind += [shape for shape in self.scenery if np.allclose(shape[3], LEGS)]
        self._paint(set(shapes) - set(self.scenery), 0)
        self.background = self._shoot(STATIC_VIEW, STATIC_LENS)
        self._paint(shapes, 1)

    def close(self):
        """Free the physics client; the object is of no use afterwards. May be called twice."""
        if self.client is not None:
            self.client = pb.disconnect(self.client)     # None

    def reset(self, robot_obs=None, scene_obs=None, seed=None):
        """Restore a recorded state; what is not given is drawn from `seed`. -> obs."""
        robot, scene = checked_start(robot_obs, scene_obs, seed)
        self._build()
        c = dict(physicsClientId=self.client)
        for joint, q in zip(ARM + FINGERS, [*robot[7:14], robot[6] / 2, robot[6] / 2]):
            pb.resetJointState(self.robot, joint, q, 0, **c)
        for joint, q in zip(self.fixtures, scene):
            pb.resetJointState(self.desk, joint, q, 0, **c)
        for body, pose in zip(self.blocks, scene[6:].reshape(3, 6)):
            pb.resetBasePositionAndOrientation(body, pose[:3], pb.getQuaternionFromEuler(pose[3:]), **c)
            pb.resetBaseVelocity(body, (0, 0, 0), (0, 0, 0), **c)
            if abs(pose[2] - 0.46) < 0.002 and np.abs(pose[3:5]).max() < 0.01:     # asleep until touched: saves time
                pb.changeDynamics(body, -1, activationState=pb.ACTIVATION_STATE_SLEEP, **c)
        self.bulb, self.led, self.command = int(scene[BULB] > 0.5), int(scene[LED] > 0.5), 1.0 if robot[14] >= 0 else -1.0
        self.lifted = self.pressed = False               # CALVIN forgets both at a reset
        self._drive(robot[7:14])
        obs = self._observe()
        self.target = self.tcp.copy()
        return obs

    def step(self, action, look=True):
        """One control step: action [7] in [-1, 1] -> obs, without pictures (most of a step's time) if nobody looks."""
        action = checked_action(action)
        self.target = advance_target(self.target, action, self.tcp)
        self.command = 1.0 if action[6] >= 0 else -1.0
        joints = pb.calculateInverseKinematics(
            self.robot, TCP_LINK, self.target[:3], pb.getQuaternionFromEuler(self.target[3:]), lowerLimits=[-7] * 9,
            upperLimits=[7] * 9, jointRanges=[7] * 9, restPoses=[*HOME, 0, 0], maxNumIterations=14, physicsClientId=self.client)
        self._drive(np.clip(joints[:7], JOINT_LOW, JOINT_HIGH))
        pb.stepSimulation(self.client)
        self._update_lamps()
        return self._observe(look)

    def _drive(self, joints):
        finger = (0.04, 2, 1) if self.command > 0 else (0.0, 200, 1)
        for joint, (goal, force, speed) in zip(ARM + FINGERS, [(q, 200, 2) for q in joints] + [finger] * 2):
            pb.setJointMotorControl2(self.robot, joint, pb.POSITION_CONTROL, targetPosition=goal, force=force / SUBSTEPS,
                                     maxVelocity=speed, physicsClientId=self.client)

    def _update_lamps(self):
        joints = [state[0] for state in pb.getJointStates(self.desk, self.fixtures, self.client)]
        lifted, pressed = joints[SWITCH] > BULB_AT, joints[BUTTON] > LED_AT
        self.bulb = int(lifted) if lifted != self.lifted else self.bulb
        self.led = 1 - self.led if pressed and not self.pressed else self.led
        self.lifted, self.pressed = lifted, pressed

    def _observe(self, look=True):
        joints = [state[0] for state in pb.getJointStates(self.robot, ARM + FINGERS, self.client)]
        position, orientation = pb.getLinkState(self.robot, TCP_LINK, 0, 1, self.client)[4:6]     # 1: forward kinematics
        euler = pb.getEulerFromQuaternion(orientation)
        robot = np.array([*position, *euler, joints[7] + joints[8], *joints[:7], self.command], np.float32)
        scene = [state[0] for state in pb.getJointStates(self.desk, self.fixtures, self.client)] + [self.bulb, self.led]
        for body in self.blocks:
            place, turn = pb.getBasePositionAndOrientation(body, self.client)
            scene += [*place, *pb.getEulerFromQuaternion(turn)]
        self.tcp = robot[:6].astype(float)               # as recorded, so that a dream can repeat the bookkeeping exactly
        obs = {"robot_obs": robot, "scene_obs": np.array(scene, np.float32)}
        if self.render and look:
            obs["rgb_static"], obs["rgb_gripper"] = self._pictures(position, orientation)
        return obs

    def _pictures(self, position, orientation):
        for i, (link, lit, colour) in enumerate(zip(self.lamp_links, (self.bulb, self.led), (YELLOW, GREEN))):
            if self.lamps[i] != lit:                     # repainting costs time: only on a change
                self._paint([(self.desk, link, 0, colour if lit else LAMP_OFF)], 1)
                self.lamps[i] = lit
        rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
        eye, camera = position + rotation @ np.array([-0.1, 0, -TCP_OFFSET]), rotation @ GRIPPER_CAM
        view = pb.computeViewMatrix(eye, eye + camera[:, 1], -camera[:, 2])
        self._paint(self.scenery, 0)                     # the fixed desk is drawn once, what moves is merged by depth
        moving, depth = self._shoot(STATIC_VIEW, STATIC_LENS)
        self._paint(self.scenery, 1)
        static = np.where(depth < self.background[1], moving, self.background[0])
        self._paint(self.behind, 0)                      # never before the hand camera, but it would cost time
        gripper = self._shoot(view, GRIPPER_LENS)[0]
        self._paint(self.behind, 1)
        return [colours(static), colours(gripper)]

    def _paint(self, shapes, alpha):
        """Show (alpha 1) or hide (0) shapes, given as (body, link, index, colour)."""
        for body, link, index, colour in shapes:
            pb.changeVisualShape(body, link, index, rgbaColor=(*colour, alpha), physicsClientId=self.client)

    def _shoot(self, view, lens):
        return take_picture(self.client, self.image_size, view, lens)


# ---- The scripted expert: sees robot_obs and scene_obs, says a relative action ---------------------------------------
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
    DRAWER: ((0.18, -0.2495, 0.36), (0, -1, 0)), SLIDER: ((0.04, 0.0, 0.545), (-1, 0, 0)),
    SWITCH: ((0.30, 0.0205, 0.527), (0, 0.5, 0.866)), BUTTON: ((-0.12, -0.12, 0.486), (0, 0, -1))}


def _slide(side, at):
    """Two ways to move the sliding door to one side (-1 left): straddle the handle, or push it with closed fingers."""
    straddle = Waypoint(0, -0.10, 0.03), Waypoint(0, 0.012, -0.004, precise=True), Waypoint(0.07 * side, 0.012, -0.004, at)
    push = Waypoint(-0.06 * side, -0.09, 0.03), Waypoint(-0.055 * side, 0.012, 0, precise=True), Waypoint(0, 0.012, 0, at)
    return Skill(SLIDER, straddle, (0, -0.12, 0.03), opening=1.0), Skill(SLIDER, push, (-0.03 * side, -0.10, 0.03))


def _press(x, opening):
    """Press the button and let go, with closed fingers or with one of two open ones."""
    points = Waypoint(x, 0, 0.06), Waypoint(x, 0, -0.03, precise=True, slow=0.6), Waypoint(x, 0, 0.05)
    return Skill(BUTTON, points, (0, -0.02, 0.12), opening=opening, pace=(0.25, 0.42))


SKILLS = {  # task -> variants; the first is the commoner
    "open_drawer": [Skill(DRAWER, (
        Waypoint(0, 0.04, 0.11), Waypoint(0, 0.035, -0.004, precise=True, slow=0.8), Waypoint(0, 0, -0.006, at=0.23, slow=0.9)),
        (0, 0.03, 0.14), along=0.06)],
    "close_drawer": [Skill(DRAWER, (
        Waypoint(0, -0.07, 0.10), Waypoint(0, -0.05, -0.004, precise=True), Waypoint(0, -0.02, -0.004, at=-0.03)),
        (0, -0.06, 0.12), along=0.06)],
    "turn_on_lightbulb": [Skill(SWITCH, (
        Waypoint(0, -0.07, -0.03), Waypoint(0, -0.005, -0.034, precise=True), Waypoint(0, 0, 0, at=0.095)),
        (-0.02, -0.10, 0), tilt=(-0.25, -0.70, 0), along=0.035)],
    "turn_off_lightbulb": [Skill(SWITCH, (
        Waypoint(0, -0.05, 0.06), Waypoint(0, 0.015, 0.045, precise=True), Waypoint(0, 0, 0, at=-0.02)),
        (-0.02, -0.10, 0.03), tilt=(-0.30, -0.50, 0), along=0.035)],
    "move_slider_left": _slide(-1, 0.28), "move_slider_right": _slide(1, 0.0),
    "turn_on_led": (_press(0, -1.0), _press(0.04, 1.0)), "turn_off_led": (_press(0, -1.0), _press(0.04, 1.0))}


def _difference(pose, other):
    """pose - other [6], angles wrapped to [-pi, pi]."""
    delta = pose - other
    delta[3:] = (delta[3:] + np.pi) % (2 * np.pi) - np.pi
    return delta


class Expert:
    """Follows noisy waypoints by relative actions: act(robot_obs [15], scene_obs [24]) -> action [7].

    It keeps the commanded pose itself, as the simulator does, so it can drive any simulator with CALVIN's actions.
    `error` (m) displaces the whole attempt, mostly to where the handle should go: a hand that arrives there cannot push it. `haste` speeds it up, `touch` bounds the pace at the handle.
    """

    def __init__(self, task_name, rng, error=0.0, haste=1.0, touch=1.0):
        self.skill = SKILLS[task_name][0 if rng.random() < 0.65 else -1]
        beyond = np.sign(TASKS[task_name].change) * np.array(HANDLES[self.skill.joint][1]) * (self.skill.joint != BUTTON)
        direction = rng.normal(1.2 * beyond, (1.0, 0.8, 0.6))      # a button has no beyond: it is missed on all sides
        self.error, self.rng, self.haste, self.touch = error * direction / np.linalg.norm(direction), rng, haste, touch
        self.queue, self.path, self.noise, self.target = [], None, np.zeros(6), None
        self.plan()

    @property
    def done(self):
        return not self.queue and self.path is None

    def plan(self):
        """Queue the waypoints of one attempt, with the variety of one person on one occasion."""
        rng, skill = self.rng, self.skill
        self.pace = min(rng.uniform(*skill.pace) * self.haste, 0.95)
        self.shift = self.error + rng.normal(0, 0.004, 3) + (rng.uniform(-skill.along, skill.along), 0, 0)
        self.tilt = np.array(skill.tilt) + rng.normal(0, (0.05, 0.05, 0.10))
        for point in skill.points:
            if point.precise and rng.random() < 0.3 / self.haste:     # come near first, then correct
                self.queue.append((point._replace(precise=False), rng.normal((0, 0, 0.015), 0.012)))
            self.queue.append((point, rng.normal(0, 0.002 if point.precise else 0.012 if point.at is None else 0.005, 3)))

    def retreat(self, wander=0):
        """Drop the plan and move away from the handle, then perhaps about the room without aim."""
        self.queue, self.path = [(None, np.array(self.skill.leave) + self.rng.normal(0, 0.02, 3))], None
        self.queue += [(None, self.rng.normal(0, (0.12, 0.10, 0.06))) for _ in range(wander)]

    def skip_ahead(self, robot_obs, scene_obs):
        """Drop the waypoints before the one where the arm already is: it may start at the handle."""
        away = [np.linalg.norm(self._goal(*step, robot_obs, scene_obs)[:3] - robot_obs[:3]) for step in self.queue[:-1]]
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
        point, noise = self.queue.pop(0)
        rng, goal = self.rng, self._goal(point, noise, robot_obs, scene_obs)
        delta = _difference(goal, self.target)
        pace = self.pace * (point.slow if point else 1.0)
        if point and point.at is not None:               # in contact a hurried arm slips off the handle
            pace = min(pace, 0.65 if self.skill.joint == SLIDER else 0.8)
        if point and (point.precise or point.at is not None):     # play hurries through the room, not always at the handle
            pace = min(pace, self.touch)
        steps = max(np.linalg.norm(delta[:3]) / MAX_REL_POS, np.abs(delta[3:]).max() / MAX_REL_ORN) / pace
        bow = rng.normal(0, 0.16, 3) * np.linalg.norm(delta[:3]) * (0.3 if point and point.at is not None else 1.0)
        pause = rng.integers(3, 11) if rng.random() < 0.22 / self.haste ** 2 else 0
        self.path = dict(start=self.target.copy(), delta=delta, bow=np.append(bow, np.zeros(3)), steps=max(steps, 2.0),
                         t=0, last=int(steps) + 1 + pause, wait=10 if point and point.precise else 0)

    def act(self, robot_obs, scene_obs):
        """robot_obs [15], scene_obs [24] -> relative action [7] in [-1, 1]; holds still once the plan is done."""
        tcp = np.asarray(robot_obs[:6], float)
        self.target = tcp.copy() if self.target is None else self.target
        if self.path is None and self.queue:
            self._next_path(robot_obs, scene_obs)
        wish = self.noise = 0.8 * self.noise + self.rng.normal(0, 0.05, 6)     # smooth: a hand, not a dice
        if path := self.path:
            path["t"] += 1
            share = min(path["t"] / path["steps"], 1.0)
            ease = 0.6 * share + 0.4 * share * share * (3 - 2 * share)
            there = path["start"] + path["delta"] * ease + path["bow"] * np.sin(np.pi * ease)
            wish = wish + _difference(there, self.target) / UNIT
            off = np.abs(path["start"] + path["delta"] - tcp)[:3].max()
            if path["t"] >= path["last"] + (path["wait"] if off > 0.006 + 0.002 * self.haste else 0):
                self.path = None
        action = np.append(wish, self.skill.opening).clip(-1, 1).astype(np.float32)
        self.target = advance_target(self.target, action.astype(float), tcp)
        return action


class _Recorder:
    """Lets experts act in a simulator and keeps the frames, each with the action executed at it."""

    def __init__(self, sim, start):
        self.sim, self.obs, self.frames, self.length = sim, sim.reset(*start), {}, 0

    def step(self, expert):
        action = expert.act(self.obs["robot_obs"], self.obs["scene_obs"])
        for key, value in {**self.obs, "rel_actions": action}.items():
            self.frames.setdefault(key, []).append(value)
        self.obs, self.length = self.sim.step(action), self.length + 1
        return self.obs["scene_obs"]

    def episode(self):
        return {key: np.stack(values) for key, values in self.frames.items()}


def demo_episode(sim, task_name, seed, max_steps=120):
    """One demonstration from a random start -> (episode of arrays [T, ...], solved). A function of the seed alone."""
    rng = np.random.default_rng([seed, list(TASKS).index(task_name), 1])
    recorder, expert, last = _Recorder(sim, sample_start(task_name, rng)), Expert(task_name, rng), None
    start = recorder.obs["scene_obs"]
    while recorder.length < max_steps and recorder.length != last:
        scene = recorder.step(expert)
        if last is None and success(task_name, start, scene):
            last = recorder.length + rng.integers(8, 17) # a while longer, as a person would: success is more than one moment
        elif last is None and expert.done:               # a person who sees that it failed tries again
            expert.plan()
    return recorder.episode(), last is not None


def _next_task(scene, last, rng):
    """What a playing person tries next: often the same thing back again, seldom what cannot work."""
    options, draw = list(TASKS), rng.random()
    if draw < 0.96:
        options = [name for name in TASKS if possible(name, scene)]
    if draw < 0.45 and last is not None:
        options = [name for name in options if TASKS[name].index == TASKS[last].index] or options
    liking = np.array([{LED: 2.0, BULB: 2.2, SLIDER: 2.0, DRAWER: 1.2}[TASKS[name].index] for name in options])
    return options[rng.choice(len(options), p=liking / liking.sum())]


def play_episode(sim, seed, length):
    """`length` frames of play, half of the attempts near misses or misses -> episode of arrays [length, ...]. A function of the seed."""
    rng, name = np.random.default_rng([seed, 0, 2]), None
    recorder = _Recorder(sim, sample_start(list(TASKS)[rng.integers(len(TASKS))], rng))
    while recorder.length < length:
        before = recorder.obs["scene_obs"]
        name = _next_task(before, name, rng)
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


# ---- Command line ----------------------------------------------------------------------------------------------------
def check(sim, names, n):
    """Print how often and how fast the expert solves each task."""
    print(f"{'task':20s} solved   steps to success: min median max   under 72")
    for name in names:
        lengths = []
        for seed in range(n):
            episode, solved = demo_episode(sim, name, seed)
            done = success(name, episode["scene_obs"][0], episode["scene_obs"])
            lengths += [np.append(done, True).argmax()] * solved
        text = f"{name:20s} {len(lengths):3d}/{n:<3d} {min(lengths):21d} {np.median(lengths):6.1f} {max(lengths):3d}"
        print(text, f"{np.mean(np.array(lengths) < 72):9.2f}", flush=True)


def play_stats(steps):
    """Print events per 1,000 play steps, and steps per second with both pictures."""
    sim, wall, cpu = Tabletop(), time.perf_counter(), time.process_time()
    scenes = [play_episode(sim, seed, 1000)["scene_obs"] for seed in range(max(1, steps // 1000))]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for name, task in TASKS.items():
        count = 0
        for values in scenes:                            # an event: the predicate holds since the last opposite extreme
            lowest = np.inf
            for value in values[:, task.index] * np.sign(task.change):
                lowest = min(lowest, value)
                if value - lowest > abs(task.change):
                    count, lowest = count + 1, value
        print(f"{name:20s} {count / len(scenes):5.1f} per 1,000 steps")
    print("{:.0f} steps/s, {:.0f} per CPU second, both pictures".format(*(1000 * len(scenes) / t for t in (wall, cpu))))


def view(out):
    """Write a contact sheet: each row one task, frames of an expert episode, static over gripper camera."""
    import imageio.v2 as imageio
    sim, rows = Tabletop(128), []
    for name in TASKS:
        episode = demo_episode(sim, name, 0)[0]
        picks = np.linspace(0, len(episode["rel_actions"]) - 1, 8).astype(int)
        rows += [np.concatenate(episode[key][picks], 1) for key in ("rgb_static", "rgb_gripper")]
    imageio.imwrite(out, np.concatenate(rows, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("check", "play-stats", "view"))
    parser.add_argument("--task", default="all", choices=("all", *TASKS), help="what to check")
    parser.add_argument("--n", type=int, default=100, help="random starts to check a task from")
    parser.add_argument("--steps", type=int, default=5000, help="steps of play to count events in")
    parser.add_argument("--out", default="view.png", help="where view writes its picture")
    parser.add_argument("--sim", default="tabletop", choices=("tabletop", "calvin"), help="the simulator to check the expert in")
    parser.add_argument("--calvin-root", "--calvin_root", default="calvin_env", help="the clone of calvin_env")
    args = parser.parse_args()
    if args.command == "check":
        from calvin_real import InputError, RealCalvin   # here: it imports this file
        try:
            sim = Tabletop(render=False) if args.sim == "tabletop" else RealCalvin(render=False, root=args.calvin_root)
        except InputError as error:
            parser.exit(2, f"calvin_sim: {error}\n")
        check(sim, list(TASKS) if args.task == "all" else [args.task], args.n)
    else:
        play_stats(args.steps) if args.command == "play-stats" else view(args.out)


if __name__ == "__main__":
    main()
