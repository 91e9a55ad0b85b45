"""The real CALVIN simulator (github.com/mees/calvin_env, scene D) behind the tabletop's interface.

    git clone https://github.com/mees/calvin_env
    pip install hydra-core hydra-colorlog scipy numpy-quaternion
    python calvin_sim.py check --sim calvin --calvin-root calvin_env       the same expert, the same tasks

The clone is used as it is, without a patch and without a GPU.  Each guard stands at the trap that it is for.
"""
import contextlib
import importlib
import logging
import sys
import types
import warnings
from pathlib import Path

import numpy as np

from calvin_sim import (BULB, LED, advance_target, checked_action, checked_start, colours, muted, pb,
                        take_picture)
from data import area_resize
from support.files import InputError

CLONE = "git clone https://github.com/mees/calvin_env"
PIP = "pip install hydra-core hydra-colorlog scipy numpy-quaternion"
OVERRIDES = ["scene=calvin_scene_D", "robot=panda_longer_finger", "use_vr=false", "record=false",
             "env.use_egl=false", "env.show_gui=false", "env.use_scene_info=true"]
HAND = 8                 # the robot's link; its links from 0 to here are most of what there is to draw
BEYOND = 1.02            # out of view: two of 200 pixels beyond the picture's edge
NEEDED = ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", "data/calvin_table_D")
RENDERER = "calvin_env, PyBullet TinyRenderer (CPU), 200 and 84 px"


@contextlib.contextmanager
def quiet():
    """Swallow what hydra warns of and what pybullet's C code prints on stdout."""
    print(end="", flush=True)                            # what is Python's own and still waits
    with muted(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        print(end="", flush=True)


def import_calvin_env(root):
    """Import calvin_env from its clone `root` -> the package hydra, which builds it; or an InputError."""
    root = Path(root or "calvin_env").absolute()
    for needed in NEEDED:
        if not (root / needed).exists():
            raise InputError(f"{root} is no clone of calvin_env ({needed} is missing there): '{CLONE}', then "
                             f"give its folder with --calvin-root")
    # gym, git and cv2 serve a base class, a line in the log and a window that nobody opens; an empty module
    # does as well, and spares gym's long warning, GitPython's need of a git executable and OpenCV's of libGL
    empty = {name: types.ModuleType(name) for name in ("gym", "gym.utils", "gym.utils.seeding", "git", "cv2")}
    empty["gym"].Env = object
    empty["gym"].utils = empty["gym.utils"]
    empty["gym.utils"].seeding = empty["gym.utils.seeding"]
    empty["gym.utils.seeding"].np_random = lambda seed: (np.random.default_rng(seed), seed)
    replaced = {name: sys.modules.get(name) for name in empty}
    sys.modules.update(empty)
    sys.path.insert(0, str(root))
    try:
        with quiet():
            hydra = importlib.import_module("hydra")
            for name in ("hydra_plugins.hydra_colorlog", "calvin_env.robot.robot",
                         "calvin_env.scene.play_table_scene"):
                importlib.import_module(name)
            module = importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise InputError(f"calvin_env cannot be imported from {root} ({error}): '{PIP}'") from error
    finally:
        sys.path.remove(str(root))
        for name, package in replaced.items():
            sys.modules.pop(name) if package is None else sys.modules.update({name: package})
    module.get_git_commit_hash = lambda path: "unknown"      # it fails where the folder has no .git
    # it closes by number, and so would close the next simulator, which has the same one
    module.PlayTableSimEnv.__del__ = lambda env: None
    return hydra


def outline(shape, directions=300):
    """A shape of getVisualShapeData -> its mesh's outermost points [directions, 3]: it lies within them, but
    for hairs."""
    with open(shape[4]) as file:
        points = np.array([line.split()[1:4] for line in file if line.startswith("v ")], float)   # [V, 3]
    around = np.random.default_rng(0).normal(size=(3, directions))
    return points[(points @ around).argmax(0)] + shape[5]


def merged(above, below):
    """Two drawings (picture, depth) of one view -> one.

    Depths are rounded: where they are alike `above` shows, as it mostly does if both are drawn at once."""
    shows = above[1] <= below[1]
    return np.where(shows, above[0], below[0]), np.where(shows, above[1], below[1])


class RealCalvin:
    """calvin_env with the interface of Tabletop.  Frames have CALVIN's own sizes (200 and 84 px), then
    averaged down.

    The pictures are calvin_env's own, at half the price: what stands still is not drawn again, and what is
    out of view not at all.
    One a process: some of calvin_env's calls go to the first physics client, whoever owns it."""

    def __init__(self, image_size=64, render=True, root=None):
        self.image_size = image_size
        self.env = None
        hydra = import_calvin_env(root)
        if pb.isConnected(0):
            raise InputError("another simulator is open in this process, and calvin_env would draw into it: "
                             "close() it, or use one process for each")
        logging.getLogger("calvin_env").setLevel(logging.WARNING)
        overrides = OVERRIDES + ["cameras=static_and_gripper" if render else "cameras=no_cameras"]
        folder = Path(root or "calvin_env").absolute() / "conf"
        with quiet():
            with hydra.initialize_config_dir(str(folder), version_base="1.1"):
                config = hydra.compose("config_data_collection", overrides=overrides)
            self.env = hydra.utils.instantiate(config.env, seed=0)
        self.button = self.env.scene.buttons[0]
        self.switch = self.env.scene.switches[0]
        self.cameras = {camera.name: camera for camera in self.env.cameras}
        self.env.cameras = []                            # its step() would draw everything
        self.lenses = {}
        for name, eye in self.cameras.items():
            self.lenses[name] = pb.computeProjectionMatrixFOV(eye.fov, eye.aspect, eye.nearval, eye.farval)
        if render:
            self._sort_shapes()
        self.pristine = self.env.p.saveState()
        self.reset(seed=0)

    def _sort_shapes(self):
        """What is drawn, by how it moves; and a first drawing of what never does."""
        client, robot, table = self.env.cid, self.env.robot.robot_uid, self.button.uid
        lamps = [light.link_id for light in self.env.scene.lights]       # they stand still, but change colour
        links = range(pb.getNumJoints(table, client))
        self.joints = [link for link in links if pb.getJointInfo(table, link, client)[2] != pb.JOINT_FIXED]
        self.scenery, self.moving, self.arm, outlines = [], [], [], []   # lists of (body, link, colour)
        for body in (pb.getBodyUniqueId(i, client) for i in range(pb.getNumBodies(client))):
            loose = body not in (robot, table) and pb.getDynamicsInfo(body, -1, client)[0] > 0
            for shape in pb.getVisualShapeData(body, physicsClientId=client):
                link = shape[1]
                drawn = body, link, shape[7][:3]
                if loose or body == robot and link >= 0:
                    self.moving.append(drawn)
                elif body != table or link not in self.joints + lamps:
                    self.scenery.append(drawn)
                if body == robot and 0 <= link <= HAND:
                    self.arm.append(drawn)
                    outlines.append(outline(shape))
        self.outlines = np.stack(outlines)               # [links, directions, 3]
        view = self.cameras["static"].viewMatrix
        self.background = self._draw("static", view, self._fixtures() + self.moving)
        self.still, self.still_shows = self.background, None

    def _fixtures(self):
        """What is drawn of the table's doors, button, switch and lamps, in today's colours."""
        table, scenery = self.button.uid, {drawn[:2] for drawn in self.scenery}
        shapes = pb.getVisualShapeData(table, physicsClientId=self.env.cid)
        return [(table, shape[1], shape[7][:3]) for shape in shapes if (table, shape[1]) not in scenery]

    def _paint(self, shapes, alpha):
        """Show (alpha 1) or hide (0) shapes, given as (body, link, colour)."""
        for body, link, colour in shapes:
            pb.changeVisualShape(body, link, rgbaColor=(*colour, alpha), physicsClientId=self.env.cid)

    def _draw(self, name, view, hidden):
        """What a camera sees without the hidden shapes.  -> picture [S, S] u32, depth [S, S]"""
        self._paint(hidden, 0)
        drawing = take_picture(self.env.cid, self.cameras[name].width, view, self.lenses[name])
        self._paint(hidden, 1)
        return drawing

    def _out_of_view(self, name, view):
        """The links of the arm that a camera cannot see now: all their points lie beyond one side of its
        picture, or behind it."""
        poses = [pb.getLinkState(*drawn[:2], physicsClientId=self.env.cid)[4:6] for drawn in self.arm]
        places = np.array([place for place, _ in poses])
        turns = np.reshape([pb.getMatrixFromQuaternion(turn) for _, turn in poses], (-1, 3, 3))
        points = self.outlines @ turns.transpose(0, 2, 1) + places[:, None]
        onto_screen = np.reshape(view, (4, 4)) @ np.reshape(self.lenses[name], (4, 4))
        x, y, _, w = np.moveaxis(points @ onto_screen[:3] + onto_screen[3], -1, 0)
        edge = BEYOND * w                                # seen: -w < x < w and -w < y < w
        out = np.stack([x > edge, -x > edge, y > edge, -y > edge, w < 0])        # [sides, links, directions]
        return [self.arm[i] for i in np.flatnonzero(out.all(-1).any(0))]

    def _pictures(self):
        """Both cameras at their own sizes, each without what it cannot see.  -> {name: [S, S, 3] u8}"""
        view = self.cameras["static"].viewMatrix
        fixtures = self._fixtures()
        states = pb.getJointStates(self.button.uid, self.joints, self.env.cid)
        shows = fixtures, [state[0] for state in states]
        if shows != self.still_shows:                    # in two frames of three nothing of it has changed
            self.still = merged(self._draw("static", view, self.scenery + self.moving), self.background)
            self.still_shows = shows
        moving = self._draw("static", view, self.scenery + fixtures + self._out_of_view("static", view))
        static = merged(moving, self.still)[0]
        camera = self.cameras["gripper"]
        hand = pb.getLinkState(camera.robot_uid, camera.gripper_cam_link, physicsClientId=self.env.cid)
        position, orientation = hand[:2]
        turn = np.reshape(pb.getMatrixFromQuaternion(orientation), (3, 3))
        view = pb.computeViewMatrix(position, position + turn[:, 1], -turn[:, 2])
        gripper = self._draw("gripper", view, self._out_of_view("gripper", view))[0]
        return {"rgb_static": colours(static), "rgb_gripper": colours(gripper)}

    def close(self):
        """Free the physics client; the object is of no use afterwards.  May be called twice."""
        if self.env is not None:
            with quiet():
                self.env.close()
            self.env = None

    def reset(self, robot_obs=None, scene_obs=None, seed=None):
        """Restore a recorded state; what is not given is drawn from `seed`. -> obs."""
        robot, scene = checked_start(robot_obs, scene_obs, seed)
        scene[[BULB, LED]] = scene[[BULB, LED]] > 0.5    # it takes exactly 0 and 1
        self.env.robot.gripper_action = 1 if robot[14] >= 0 else -1      # its reset forgets the last command
        # It also keeps old contacts, so an episode would depend on those before it; a step in between forgets
        # them
        self.env.p.restoreState(self.pristine)
        self.env.p.stepSimulation()
        self.env.p.restoreState(self.pristine)
        raw = self.env.reset(robot, scene)
        # It forgets that the button is down and the switch up: the first step would take them for a new press
        self.button.prev_is_pressed = self.button._is_pressed
        self.switch.state = type(self.switch.state)(int(self.switch.is_pressed))
        obs = self._observe(raw)
        self.target = self.tcp.copy()
        return obs

    def step(self, action, look=True):
        """One control step of 1/30 s: action [7] in [-1, 1] -> obs, without pictures if nobody looks.

        They are most of a step's time."""
        action = checked_action(action)
        # Its own target runs away from a blocked arm without end; ours, the tabletop's and the dream's, does
        # not
        self.target = advance_target(self.target, action, self.tcp)
        self.env.robot.target_pos = self.target[:3].copy()
        self.env.robot.target_orn = self.target[3:].copy()
        still = np.array([0, 0, 0, 0, 0, 0, 1.0 if action[6] >= 0 else -1.0])    # it takes exactly -1 and +1
        return self._observe(self.env.step(still)[0], look)

    def _observe(self, raw, look=True):
        obs = {key: raw[key].astype(np.float32) for key in ("robot_obs", "scene_obs")}
        self.tcp = obs["robot_obs"][:6].astype(float)    # as recorded, for a dream to repeat
        if self.cameras and look:
            for name, picture in self._pictures().items():
                obs[name] = area_resize(picture, self.image_size)
        return obs
