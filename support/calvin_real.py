"""The real CALVIN simulator (github.com/mees/calvin_env, scene D) behind the interface of the built-in tabletop.

    git clone https://github.com/mees/calvin_env && pip install hydra-core hydra-colorlog scipy numpy-quaternion
    python calvin_sim.py check --sim calvin --calvin-root calvin_env            the same expert, the same tasks

The clone is used as it is, without a patch and without a GPU.  Each guard below stands at the trap that it is for.
"""
import contextlib
import importlib
import logging
import sys
import types
import warnings
from pathlib import Path

import numpy as np

from calvin_sim import BULB, LED, advance_target, checked_action, checked_start, colours, muted, pb, take_picture
from data import area_resize
from support.files import InputError

CLONE = "git clone https://github.com/mees/calvin_env"
PIP = "pip install hydra-core hydra-colorlog scipy numpy-quaternion"
OVERRIDES = ["scene=calvin_scene_D", "robot=panda_longer_finger", "use_vr=false", "record=false",
             "env.use_egl=false", "env.show_gui=false", "env.use_scene_info=true"]
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
    """Import calvin_env from its clone `root` -> the package hydra, which builds it; InputError where that cannot work."""
    root = Path(root or "calvin_env").absolute()
    for needed in ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", "data/calvin_table_D"):
        if not (root / needed).exists():
            raise InputError(f"{root} is no clone of calvin_env ({needed} is missing there): '{CLONE}', then give its folder with --calvin-root")
    # gym, git and cv2 serve a base class, a line in the log and a window that nobody opens; an empty module does as well, and spares
    # gym's long warning, GitPython's need of a git executable and OpenCV's of libGL
    empty = {name: types.ModuleType(name) for name in ("gym", "gym.utils", "gym.utils.seeding", "git", "cv2")}
    empty["gym"].Env, empty["gym"].utils, empty["gym.utils"].seeding = object, empty["gym.utils"], empty["gym.utils.seeding"]
    empty["gym.utils.seeding"].np_random = lambda seed: (np.random.default_rng(seed), seed)
    replaced = {name: sys.modules.get(name) for name in empty}
    sys.modules.update(empty)
    sys.path.insert(0, str(root))
    try:
        with quiet():
            hydra = importlib.import_module("hydra")
            for name in ("hydra_plugins.hydra_colorlog", "calvin_env.robot.robot", "calvin_env.scene.play_table_scene"):
                importlib.import_module(name)
            module = importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise InputError(f"calvin_env cannot be imported from {root} ({error}): '{PIP}'") from error
    finally:
        sys.path.remove(str(root))
        for name, package in replaced.items():
            sys.modules.pop(name) if package is None else sys.modules.update({name: package})
    module.get_git_commit_hash = lambda path: "unknown"      # it fails where the folder has no .git
    module.PlayTableSimEnv.__del__ = lambda env: None        # it closes by number, and so the next simulator, which has the same one
    return hydra
def outline(path, offset, directions=300):
    """The outermost points of a mesh (an .obj file), moved by offset [3]: [3, N], which the whole mesh lies within, but for hairs."""
    with open(path) as file:
        points = np.array([line.split()[1:4] for line in file if line.startswith("v ")], float)        # [V, 3]
    around = np.random.default_rng(0).normal(size=(3, directions))
    return points[np.unique((points @ around).argmax(0))].T + np.reshape(offset, (3, 1))


class RealCalvin:
    """calvin_env with the interface of Tabletop.  Frames are rendered at CALVIN's own sizes (200 and 84 px) and averaged down.

    The pictures are calvin_env's own, at less than half the price: what never moves is drawn once, and what cannot be seen is not.
    One a process: some of calvin_env's calls go to the first physics client, whoever owns it."""

    def __init__(self, image_size=64, render=True, root=None):
        self.image_size, self.env = image_size, None
        hydra = import_calvin_env(root)
        if pb.isConnected(0):
            raise InputError("another simulator is open in this process, and calvin_env would draw into it: close() it, or use one process for each")
        logging.getLogger("calvin_env").setLevel(logging.WARNING)
        overrides = OVERRIDES + ["cameras=static_and_gripper" if render else "cameras=no_cameras"]
        with quiet():
            with hydra.initialize_config_dir(str(Path(root or "calvin_env").absolute() / "conf"), version_base="1.1"):
                config = hydra.compose("config_data_collection", overrides=overrides)
            self.env = hydra.utils.instantiate(config.env, seed=0)
        self.button, self.switch = self.env.scene.buttons[0], self.env.scene.switches[0]
        self.cameras = {camera.name: camera for camera in self.env.cameras}
        self.env.cameras = []                            # its step() would draw everything
        self.lenses = {name: pb.computeProjectionMatrixFOV(camera.fov, camera.aspect, camera.nearval, camera.farval)
                       for name, camera in self.cameras.items()}
        if render:
            self._sort_shapes()
        self.pristine = self.env.p.saveState()
        self.reset(seed=0)

    def _sort_shapes(self):
        """List what the views can do without, and draw once what never moves."""
        client, robot, table = self.env.cid, self.env.robot.robot_uid, self.button.uid
        bodies = [pb.getBodyUniqueId(i, client) for i in range(pb.getNumBodies(client))]
        shapes = [(*data[:2], data[7][:3]) for body in bodies for data in pb.getVisualShapeData(body, physicsClientId=client)]
        lamps = [light.link_id for light in self.env.scene.lights]       # fixed, too, but they change their colour
        fixed = [link for link in range(pb.getNumJoints(table, client)) if pb.getJointInfo(table, link, client)[2] == pb.JOINT_FIXED]
        still = {(table, link) for link in fixed if link not in lamps} | {(robot, -1), (table, -1)}
        still |= {(body, -1) for body in bodies if body not in (robot, table) and pb.getDynamicsInfo(body, -1, client)[0] == 0}
        self.scenery = [shape for shape in shapes if shape[:2] in still]
        self.arm = [shape for shape in shapes if shape[0] == robot and shape[1] < 7]
        self.outlines = {data[1]: outline(data[4].decode(), data[5]) for data in pb.getVisualShapeData(robot, physicsClientId=client)
                         if 0 <= data[1] < 5}
        self.wrist = [shape for shape in self.arm if shape[1] >= 4]      # always behind the camera at the hand
        moving = [shape for shape in shapes if shape not in self.scenery]
        self._paint(moving, 0)
        self.background = self._shoot("static", self.cameras["static"].viewMatrix)
        self._paint(moving, 1)

    def _paint(self, shapes, alpha):
        """Show (alpha 1) or hide (0) shapes, given as (body, link, colour)."""
        for body, link, colour in shapes:
            pb.changeVisualShape(body, link, rgbaColor=(*colour, alpha), physicsClientId=self.env.cid)

    def _shoot(self, name, view):
        return take_picture(self.env.cid, self.cameras[name].width, view, self.lenses[name])

    def _out_of_view(self, name, view):
        """The links of the upper arm that a camera cannot see now: all their points lie beyond one side of its picture, or behind it."""
        onto_screen = np.reshape(self.lenses[name], (4, 4)).T @ np.reshape(view, (4, 4)).T
        hidden = []
        for shape in self.arm:
            if shape[1] not in self.outlines:
                continue
            position, orientation = pb.getLinkState(*shape[:2], physicsClientId=self.env.cid)[4:6]
            turn = np.reshape(pb.getMatrixFromQuaternion(orientation), (3, 3))
            points = turn @ self.outlines[shape[1]] + np.reshape(position, (3, 1))               # [3, N]
            x, y, _, w = onto_screen[:, :3] @ points + onto_screen[:, 3:]                        # seen: -w < x < w and -w < y < w
            if any((side > 1.02 * w).all() for side in (x, -x, y, -y)) or (w < 0).all():
                hidden.append(shape)
        return hidden

    def _pictures(self):
        """Both cameras, without what they cannot see, the static one over its background.  -> {name: [S, S, 3] u8}"""
        view = self.cameras["static"].viewMatrix
        hidden = self.scenery + self._out_of_view("static", view)
        self._paint(hidden, 0)
        moving, depth = self._shoot("static", view)
        self._paint(hidden, 1)
        pictures = {"rgb_static": np.where(depth < self.background[1], moving, self.background[0])}
        camera = self.cameras["gripper"]
        position, orientation = pb.getLinkState(camera.robot_uid, camera.gripper_cam_link, physicsClientId=self.env.cid)[:2]
        turn = np.reshape(pb.getMatrixFromQuaternion(orientation), (3, 3))
        view = pb.computeViewMatrix(position, position + turn[:, 1], -turn[:, 2])
        hidden = self.wrist + self._out_of_view("gripper", view)
        self._paint(hidden, 0)
        pictures["rgb_gripper"] = self._shoot("gripper", view)[0]
        self._paint(hidden, 1)
        return {name: area_resize(colours(picture), self.image_size) for name, picture in pictures.items()}

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
        self.env.p.restoreState(self.pristine)           # and keeps old contacts: an episode would depend on those before it,
        self.env.p.stepSimulation()                      # which takes a step in between to forget
        self.env.p.restoreState(self.pristine)
        raw = self.env.reset(robot, scene)
        # it also forgets that the button is down and the switch up: the first step would then take them for a new press
        self.button.prev_is_pressed = self.button._is_pressed
        self.switch.state = type(self.switch.state)(int(self.switch.is_pressed))
        obs = self._observe(raw)
        self.target = self.tcp.copy()
        return obs

    def step(self, action, look=True):
        """One control step of 1/30 s: action [7] in [-1, 1] -> obs, without pictures (most of a step's time) if nobody looks."""
        action = checked_action(action)
        # its own target runs away from a blocked arm without end; ours, which is the tabletop's and the dream's, does not
        self.target = advance_target(self.target, action, self.tcp)
        self.env.robot.target_pos, self.env.robot.target_orn = self.target[:3].copy(), self.target[3:].copy()
        still = np.array([0, 0, 0, 0, 0, 0, 1.0 if action[6] >= 0 else -1.0])    # it takes exactly -1 and +1
        return self._observe(self.env.step(still)[0], look)

    def _observe(self, raw, look=True):
        obs = {"robot_obs": raw["robot_obs"].astype(np.float32), "scene_obs": raw["scene_obs"].astype(np.float32)}
        self.tcp = obs["robot_obs"][:6].astype(float)    # as recorded, so that a dream can repeat the bookkeeping exactly
        if self.cameras and look:
            obs.update(self._pictures())
        return obs
