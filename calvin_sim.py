"""A small CALVIN-D tabletop in PyBullet: eight tasks, two cameras, a scripted expert and play.

    python calvin_sim.py check [--task open_drawer] [--n 100]    success and steps of the scripted expert
    python calvin_sim.py check --sim calvin --calvin-root PATH   the same in the real simulator, see
                                                                 support/calvin_real.py
    python calvin_sim.py play-stats [--steps 5000]               events per 1,000 play steps, steps per second
    python calvin_sim.py view [--out view.png]                   one contact sheet of both cameras

A Franka Panda stands at a desk with a drawer, a sliding door, a lever that lights a bulb, a button that
toggles an LED and three loose blocks, at the poses, axes, limits and thresholds measured in the real CALVIN
simulator (scene D).
World frame: x right, y into the desk, z up; metres, radians, extrinsic xyz Euler angles (roll, pitch, yaw).

    robot_obs [15]  0-2 tcp position, 3-5 tcp Euler, 6 gripper opening (m), 7-13 arm joints,
                    14 last gripper command (+-1)
    scene_obs [24]  0 slider, 1 drawer, 2 button, 3 switch (joint, m), 4 bulb, 5 LED (0/1),
                    6-11 / 12-17 / 18-23 red / blue / pink block: position, Euler
    action    [7]   dx dy dz (x 0.02 m), droll dpitch dyaw (x 0.05 rad), gripper (>= 0 opens),
                    all in [-1, 1], 30 Hz

Departures from CALVIN: plain colours and low-polygon links (a step with both pictures is 20 times faster);
the target pose may lead the measured one by WINDUP_* at most; an episode depends on its start and its actions
only.
"""
import contextlib
import os
import struct
import tempfile
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

from support.tabletop_model import BLOCKS, GREEN, JOINTS, LAMP_OFF, LEGS, TCP_OFFSET, YELLOW
from support.tabletop_model import euler_matrix, urdf_files

MAX_REL_POS = 0.02                           # what an action of 1 moves the target: m,
MAX_REL_ORN = 0.05                           # and rad
WINDUP_POS = 0.06                            # how far the target may lead the measured tcp, per component: m,
WINDUP_ORN = 0.15                            # and rad
ROBOT_BASE = (-0.34, -0.46, 0.24)
HOME = np.array([-1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534])  # CALVIN's arm joints, rad
TIP = 0.0157                                 # fingertips beyond the tcp, along the tool: m
ARM = tuple(range(7))                        # joints of the robot
FINGERS = (9, 10)
HAND_LINK = 8
TCP_LINK = 11
JOINT_LOW = np.array([-2.9671, -1.8326, -2.9671, -3.1416, -2.9671, -0.0873, -2.9671])
JOINT_HIGH = np.array([2.9671, 1.8326, 2.9671, 0.0, 2.9671, 3.8223, 2.9671])
SLIDER, DRAWER, BUTTON, SWITCH, BULB, LED = range(6)     # places in scene_obs
SUBSTEPS = 8                                 # a motor's whole impulse acts in each: its force is divided
BULB_AT = 0.044                              # joint thresholds of the two lamps, m
LED_AT = 0.010
LIMITS = (0.28, 0.22, 0.02, 0.088)           # travel of slider, drawer, button, switch, m


# ---- Tasks: CALVIN's predicates and start states, pure functions of the scene state ------------------------
class Task(NamedTuple):
    """Another task is another line of TASKS: "press the button while the drawer is open" would be
    Task("led_while_open", LED, 0.5, "press the button ...", holds=(DRAWER,), skill="turn_on_led")."""
    name: str
    index: int           # the scene_obs entry that the task changes
    change: float        # fulfilled when that entry has changed by more than this in this direction
    phrase: str
    holds: tuple = ()    # entries that must be far (left, open, up, lit) in the end; starts have them so, too
    skill: str = ""      # the task whose expert it borrows; "" = it has its own in support/expert.py


TASKS = {t.name: t for t in (
    Task("open_drawer", DRAWER, 0.12, "pull the handle to open the drawer"),
    Task("close_drawer", DRAWER, -0.12, "push the handle to close the drawer"),
    Task("move_slider_left", SLIDER, 0.15, "push the sliding door to the left side"),
    Task("move_slider_right", SLIDER, -0.15, "push the sliding door to the right side"),
    Task("turn_on_lightbulb", BULB, 0.5, "use the switch to turn on the light bulb"),
    Task("turn_off_lightbulb", BULB, -0.5, "use the switch to turn off the light bulb"),
    Task("turn_on_led", LED, 0.5, "press the button to turn on the LED"),
    Task("turn_off_led", LED, -0.5, "press the button to turn off the LED"),
)}


FAR = {SLIDER: 0.15, DRAWER: 0.12, SWITCH: 0.044, BULB: 0.5, LED: 0.5}     # far is beyond this: m, or 0/1


def held(task_name, scene):
    """scene [..., 24] -> bool [...]: is all that the task wants held where it wants it?"""
    scene = np.asarray(scene)
    conditions = [scene[..., entry] > FAR[entry] for entry in TASKS[task_name].holds]
    return np.all(conditions, 0) if conditions else np.ones(scene.shape[:-1], bool)


def success(task_name, scene_start, scene_now):
    """CALVIN's predicate: scene_start, scene_now [..., 24] -> bool [...]. Momentary; strict, as in CALVIN."""
    task = TASKS[task_name]
    start = np.asarray(scene_start)[..., task.index]
    moved = (np.asarray(scene_now)[..., task.index] - start) * np.sign(task.change)
    return (moved > abs(task.change)) & held(task_name, scene_now)


def possible(task_name, scene):
    """scene [..., 24] -> bool [...]: is there room for the change that the task asks for?"""
    task = TASKS[task_name]
    goal = np.asarray(scene)[..., task.index] + task.change
    return (0 < goal) & (goal < (*LIMITS, 1, 1)[task.index]) & held(task_name, scene)


def sample_start(task_name, rng):
    """Draw (robot_obs [15], scene_obs [24]) in which `task_name` is yet to be done.

    Everything else is random."""
    task = TASKS[task_name]
    scene = np.zeros(24, np.float32)
    far = rng.random(6) < 0.5                            # which fixtures are left / open / up / lit
    far[task.index] = task.change < 0
    far[list(task.holds)] = True
    far[[SWITCH, BULB]] = far[BULB] | (SWITCH in task.holds)
    for joint, (near, away) in {SLIDER: (0.06, 0.22), DRAWER: (0.03, 0.17), SWITCH: (0.02, 0.07)}.items():
        scene[joint] = rng.uniform(away, LIMITS[joint]) if far[joint] else rng.uniform(0, near)
    scene[BULB] = far[BULB]
    scene[LED] = far[LED]
    surfaces = ((0.0, 0.35, -0.15, -0.03), (-0.32, -0.16, 0.05, 0.12), (-0.05, 0.13, 0.05, 0.12))
    centres = []
    while len(centres) < 3:                  # 0.1 m apart: the longest block has a half diagonal of 0.045
        x0, x1, y0, y1 = surfaces[rng.choice(3, p=(0.6, 0.2, 0.2))]
        centre = np.array([rng.uniform(x0, x1), rng.uniform(y0, y1)])
        if all(np.linalg.norm(centre - other) > 0.1 for other in centres):
            block = 6 + 6 * len(centres)
            scene[block:block + 6] = (*centre, 0.46, 0, 0, rng.uniform(0, np.pi))
            centres.append(centre)
    return sample_robot(rng), scene


def sample_robot(rng):
    """Draw a robot_obs [15] anywhere above the desk's front, tilted by up to 21 degrees.

    In CALVIN's chains of tasks each but the first begins where the last skill left the arm."""
    while True:
        joints = HOME + rng.uniform(-0.45, 0.45, 7)
        tcp, axis = forward_kinematics(joints)
        above_front = -0.27 < tcp[0] < 0.33 and -0.46 < tcp[1] < -0.08 and 0.525 < tcp[2] < 0.70
        if above_front and axis[2] < -0.93:
            opening = 0.08 if rng.random() < 0.5 else 0.0
            return np.concatenate([tcp, [opening], joints, [1.0 if opening else -1.0]]).astype(np.float32)


OFFICIAL_POSE = (0.02587, -0.23131, 0.57128, 3.0905, -0.0291, 1.5001, 0.08,
                 -1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534, 1)
CABINET = ((-0.2409, 0.0924, 0.461), (0.0703, 0.0924, 0.461))            # left and right of the sliding door
TABLE = ((0.05, -0.12, 0.46), (0.23, -0.12, 0.46))


def official_start(task_name, rng):
    """Draw an initial state of CALVIN's own long-horizon protocol in which `task_name` is yet to be done.

    It has 16 combinations of door, drawer, bulb and LED and 12 of the blocks (one or two of them on the
    table, the others in the cabinet), and the arm always in one pose.  The blocks' yaws, pi/2 +- pi/8, are
    drawn here; CALVIN draws them with a hash of the combination.  -> robot_obs [15], scene_obs [24]"""
    while True:
        scene = np.zeros(24, np.float32)
        slider, drawer, bulb, led = rng.integers(0, 2, 4)
        for joint, far in ((SLIDER, slider), (DRAWER, drawer), (SWITCH, bulb)):
            scene[joint] = far * LIMITS[joint]
        scene[[BULB, LED]] = bulb, led
        on_table = rng.integers(1, 3)
        spots = [*rng.permutation(TABLE)[:on_table], *rng.permutation(CABINET)[:3 - on_table]]
        for block, spot in zip((6, 12, 18), rng.permutation(spots)):
            scene[block:block + 6] = (*spot, 0, 0, rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8))
        if possible(task_name, scene):
            return np.array(OFFICIAL_POSE, np.float32), scene


def checked_start(robot_obs, scene_obs, seed):
    """What a simulator's reset was given -> finite robot_obs [15], scene_obs [24] as new f64 arrays.

    What is None there is drawn from `seed`."""
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


# ---- Geometry of rotations and of the arm ------------------------------------------------------------------
PANDA = (  # joint frames in their parents: Euler angles in quarter turns, then position (from its URDF)
    ((0, 0, 0), (0, 0, 0.333)),
    ((-1, 0, 0), (0, 0, 0)),
    ((1, 0, 0), (0, -0.316, 0)),
    ((1, 0, 0), (0.0825, 0, 0)),
    ((-1, 0, 0), (-0.0825, 0.384, 0)),
    ((1, 0, 0), (0, 0, 0)),
    ((1, 0, 0), (0.088, 0, 0)),
)


def forward_kinematics(joints):
    """Arm joints [7] -> (tcp pose [6], tool axis [3]). Lets start states be drawn without a simulator."""
    position = np.array(ROBOT_BASE, float)
    rotation = np.eye(3)
    for (turn, offset), q in zip(PANDA, joints):
        position = position + rotation @ np.array(offset)
        rotation = rotation @ euler_matrix(np.array(turn) * np.pi / 2) @ euler_matrix(np.array([0, 0, q]))
    rotation = rotation @ euler_matrix(np.array([0, 0, -np.pi / 4]))     # the hand is mounted at -45 degrees
    position = position + rotation[:, 2] * (0.107 + TCP_OFFSET)
    roll = np.arctan2(rotation[2, 1], rotation[2, 2])
    pitch = -np.arcsin(rotation[2, 0])
    yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
    return np.array([*position, roll, pitch, yaw]), rotation[:, 2]


def advance_target(target, action, tcp, keep=1):
    """The commanded pose after one action, as the simulator and the dream both integrate it.

    target [..., 6] commanded pose, action [..., >= 6] in [-1, 1], tcp [..., 6] measured -> target [..., 6].
    keep: 0 forgets the lead that target had over tcp, 1 does not. Angles are wrapped; the lead over tcp is
    clamped per component, so that a blocked arm does not wind up. Numpy or torch.
    """
    lead = keep * (target - tcp)
    lead[..., 3:] = (lead[..., 3:] + np.pi) % (2 * np.pi) - np.pi
    lead[..., :3] = (lead[..., :3] + action[..., :3] * MAX_REL_POS).clip(-WINDUP_POS, WINDUP_POS)
    lead[..., 3:] = (lead[..., 3:] + action[..., 3:6] * MAX_REL_ORN).clip(-WINDUP_ORN, WINDUP_ORN)
    return tcp + lead


# ---- The simulator -----------------------------------------------------------------------------------------
STATIC_EYE = (2.8715, -2.1666, 2.5552)
STATIC_VIEW = pb.computeViewMatrix(STATIC_EYE, (-0.02624, -0.03023, 0.3920), (0.40414, 0.22630, 0.88626))
STATIC_LENS = pb.computeProjectionMatrixFOV(10, 1, 0.01, 10)
GRIPPER_LENS = pb.computeProjectionMatrixFOV(75, 1, 0.01, 2)
# in the hand frame, 0.1 m behind it; looks along its y, up is -z
GRIPPER_CAM = euler_matrix(np.array([1.3, 0, -1.57]))


def take_picture(client, size, view, lens):
    """-> picture [size, size] u32 (RGBA), depth [size, size] f32 (nonlinear)"""
    picture, depth = pb.getCameraImage(
        size, size, view, lens, shadow=0, flags=pb.ER_NO_SEGMENTATION_MASK, renderer=pb.ER_TINY_RENDERER,
        physicsClientId=client,
    )[2:4]
    if isinstance(picture, tuple):           # PyBullet built without NumPy; nothing is quicker than these two
        picture = bytearray(picture)
        depth = struct.Struct(f"{size * size}f").pack(*depth)
    shape = size, size
    return np.frombuffer(picture, np.uint32).reshape(shape), np.frombuffer(depth, np.float32).reshape(shape)


def colours(picture):
    """u32 RGBA [S, S] -> u8 [S, S, 3]; channel by channel is four times faster than one strided copy"""
    return np.stack([picture.view(np.uint8)[:, i::4] for i in range(3)], -1)


class Tabletop:
    """The desk, the arm and two cameras. One control step is 1/30 s."""

    def __init__(self, image_size=64, render=True):
        self.image_size = image_size
        self.render = render
        self.client = None
        self._build()
        self._sort_shapes()
        self.reset(seed=0)

    def _build(self):
        """A new world.

        What Bullet keeps of an old one (the order of its contacts) would tell in the last digits of one
        episode in a hundred."""
        self.close()
        self.client = pb.connect(pb.DIRECT)
        self.lamps = [None, None]
        self._load()
        self._configure()

    def _load(self):
        c = dict(physicsClientId=self.client)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in urdf_files().items():
                Path(folder, name).write_text(text)
            urdf = dict(useFixedBase=True, flags=pb.URDF_USE_INERTIA_FROM_FILE, **c)
            self.robot = pb.loadURDF(f"{folder}/panda.urdf", ROBOT_BASE, **urdf)
            self.blocks = []
            for size, colour in BLOCKS:      # what stands in front comes first: what it hides is not shaded
                half = [s / 2 for s in size]
                look = pb.createVisualShape(pb.GEOM_BOX, halfExtents=half, rgbaColor=(*colour, 1), **c)
                shape = pb.createCollisionShape(pb.GEOM_BOX, halfExtents=half, **c)
                self.blocks.append(pb.createMultiBody(1.0, shape, look, (0, 0, 1), **c))
                sleeping = pb.ACTIVATION_STATE_ENABLE_SLEEPING
                pb.changeDynamics(self.blocks[-1], -1, lateralFriction=0.7, activationState=sleeping, **c)
            self.desk = pb.loadURDF(f"{folder}/desk.urdf", **urdf)
        # a block may fall; the floor is not drawn: slow
        shape = pb.createCollisionShape(pb.GEOM_BOX, halfExtents=(3, 3, 0.1), **c)
        floor = pb.createMultiBody(0, shape, -1, (0, 0, -0.1), **c)
        pb.changeVisualShape(floor, -1, rgbaColor=(0, 0, 0, 0), **c)
        names = [pb.getJointInfo(self.desk, i, **c)[1].decode() for i in range(6)]
        self.fixtures = [names.index(name) for name in JOINTS]
        self.lamp_links = [names.index("bulb"), names.index("led")]

    def _configure(self):
        c = dict(physicsClientId=self.client)
        pb.setGravity(0, 0, -9.8, **c)
        pb.setPhysicsEngineParameter(
            fixedTimeStep=1 / 30, numSubSteps=SUBSTEPS, numSolverIterations=20,
            solverResidualThreshold=1e-7, minimumSolverIslandSize=1, **c,
        )
        # the order of contacts: not as history had it
        pb.setPhysicsEngineParameter(deterministicOverlappingPairs=1, **c)
        for body in (self.robot, self.desk):
            for joint in range(pb.getNumJoints(body, **c)):
                pb.changeDynamics(body, joint, linearDamping=0, angularDamping=0, jointDamping=0, **c)
        ends = (self.robot, FINGERS[0], self.robot, FINGERS[1])
        gear = pb.createConstraint(*ends, pb.JOINT_GEAR, (1, 0, 0), (0, 0, 0), (0, 0, 0), **c)
        pb.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50 / SUBSTEPS, **c)
        friction = dict(force=4 / SUBSTEPS, **c)
        for joint in self.fixtures:
            pb.setJointMotorControl2(self.desk, joint, pb.VELOCITY_CONTROL, targetVelocity=0, **friction)
        button = self.fixtures[BUTTON]
        pb.setJointMotorControl2(self.desk, button, pb.POSITION_CONTROL, targetPosition=0, **friction)

    def _sort_shapes(self):
        """List the drawn shapes, and draw the fixed desk for the fixed camera."""
        shapes = []
        index = {}
        for body in (self.robot, self.desk, *self.blocks):
            for data in pb.getVisualShapeData(body, physicsClientId=self.client):
                place = data[:2]                         # body and link
                index[place] = index.get(place, -1) + 1
                shapes.append((body, data[1], index[place], data[7][:3]))
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
            flat = abs(pose[2] - 0.46) < 0.002 and np.abs(pose[3:5]).max() < 0.01
            if flat:                                     # asleep until touched: saves time
                pb.changeDynamics(body, -1, activationState=pb.ACTIVATION_STATE_SLEEP, **c)
        self.bulb = int(scene[BULB] > 0.5)
        self.led = int(scene[LED] > 0.5)
        self.command = 1.0 if robot[14] >= 0 else -1.0
        self.lifted = self.pressed = False               # CALVIN forgets both at a reset
        self._drive(robot[7:14])
        obs = self._observe()
        self.target = self.tcp.copy()
        return obs

    def step(self, action, look=True):
        """One control step: action [7] in [-1, 1] -> obs.

        It is without pictures (most of a step's time) if nobody looks."""
        action = checked_action(action)
        self.target = advance_target(self.target, action, self.tcp)
        self.command = 1.0 if action[6] >= 0 else -1.0
        orientation = pb.getQuaternionFromEuler(self.target[3:])
        joints = pb.calculateInverseKinematics(
            self.robot, TCP_LINK, self.target[:3], orientation, lowerLimits=[-7] * 9, upperLimits=[7] * 9,
            jointRanges=[7] * 9, restPoses=[*HOME, 0, 0], maxNumIterations=14, physicsClientId=self.client,
        )
        self._drive(np.clip(joints[:7], JOINT_LOW, JOINT_HIGH))
        pb.stepSimulation(self.client)
        self._update_lamps()
        return self._observe(look)

    def _drive(self, joints):
        finger = (0.04, 2, 1) if self.command > 0 else (0.0, 200, 1)
        motors = [(q, 200, 2) for q in joints] + [finger] * 2
        for joint, (goal, force, speed) in zip(ARM + FINGERS, motors):
            pb.setJointMotorControl2(
                self.robot, joint, pb.POSITION_CONTROL, targetPosition=goal, force=force / SUBSTEPS,
                maxVelocity=speed, physicsClientId=self.client,
            )

    def _update_lamps(self):
        joints = [state[0] for state in pb.getJointStates(self.desk, self.fixtures, self.client)]
        lifted = joints[SWITCH] > BULB_AT
        pressed = joints[BUTTON] > LED_AT
        if lifted != self.lifted:
            self.bulb = int(lifted)
        if pressed and not self.pressed:
            self.led = 1 - self.led
        self.lifted = lifted
        self.pressed = pressed

    def _observe(self, look=True):
        joints = [state[0] for state in pb.getJointStates(self.robot, ARM + FINGERS, self.client)]
        link = pb.getLinkState(self.robot, TCP_LINK, 0, 1, self.client)      # 1: forward kinematics
        position, orientation = link[4:6]
        euler = pb.getEulerFromQuaternion(orientation)
        robot = np.array([*position, *euler, joints[7] + joints[8], *joints[:7], self.command], np.float32)
        scene = [state[0] for state in pb.getJointStates(self.desk, self.fixtures, self.client)]
        scene += [self.bulb, self.led]
        for body in self.blocks:
            place, turn = pb.getBasePositionAndOrientation(body, self.client)
            scene += [*place, *pb.getEulerFromQuaternion(turn)]
        self.tcp = robot[:6].astype(float)   # as recorded, so that a dream can repeat the bookkeeping exactly
        obs = {"robot_obs": robot, "scene_obs": np.array(scene, np.float32)}
        if self.render and look:
            obs["rgb_static"], obs["rgb_gripper"] = self._pictures(position, orientation)
        return obs

    def _pictures(self, position, orientation):
        lamps = zip(self.lamp_links, (self.bulb, self.led), (YELLOW, GREEN))
        for i, (link, lit, colour) in enumerate(lamps):
            if self.lamps[i] != lit:                     # repainting costs time: only on a change
                self._paint([(self.desk, link, 0, colour if lit else LAMP_OFF)], 1)
                self.lamps[i] = lit
        rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
        eye = position + rotation @ np.array([-0.1, 0, -TCP_OFFSET])
        camera = rotation @ GRIPPER_CAM
        view = pb.computeViewMatrix(eye, eye + camera[:, 1], -camera[:, 2])
        self._paint(self.scenery, 0)         # the fixed desk is drawn once, what moves is merged by depth
        moving, depth = self._shoot(STATIC_VIEW, STATIC_LENS)
        self._paint(self.scenery, 1)
        static = np.where(depth < self.background[1], moving, self.background[0])
        self._paint(self.behind, 0)          # never before the hand camera, but it would cost time
        gripper = self._shoot(view, GRIPPER_LENS)[0]
        self._paint(self.behind, 1)
        return [colours(static), colours(gripper)]

    def _paint(self, shapes, alpha):
        """Show (alpha 1) or hide (0) shapes, given as (body, link, index, colour)."""
        for body, link, index, colour in shapes:
            pb.changeVisualShape(body, link, index, rgbaColor=(*colour, alpha), physicsClientId=self.client)

    def _shoot(self, view, lens):
        return take_picture(self.client, self.image_size, view, lens)


if __name__ == "__main__":
    from support.expert import main
    main()
