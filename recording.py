"""recording.py: a dataset as the world model reads it.

Two things that data.py's plain arrays leave open are settled here, once, for training, dreams and the robot alike: which action belongs to which
frame (the one executed BEFORE it), and where the arm was told to be (the commanded pose, which no camera sees).
"""
import math

import numpy as np
import torch

from calvin_sim import TASKS, advance_target, success

HOME_POSE = torch.tensor([0.03, -0.23, 0.55, math.pi, 0.0, math.pi / 2])            # m, rad: the tool points straight down
HOME_JOINTS = torch.tensor([-1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534])
POSE_SCALE = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3, 0.3])


def wrap(angle):
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def encode_pose(pose):
    """TCP pose [..., 6] in m and rad -> about unit scale, continuous where roll jumps from pi to -pi."""
    home, scale = HOME_POSE.to(pose), POSE_SCALE.to(pose)
    return torch.cat([pose[..., :3] - home[:3], wrap(pose[..., 3:] - home[3:])], -1) / scale          # [..., 6]


def decode_pose(code):
    return code * POSE_SCALE.to(code) + HOME_POSE.to(code)


def encode_proprio(robot_obs):
    """CALVIN's robot_obs [..., 15] -> the same 15 numbers at about unit scale."""
    width, command = robot_obs[..., 6:7] / 0.04 - 1, robot_obs[..., 14:15]
    joints = (robot_obs[..., 7:14] - HOME_JOINTS.to(robot_obs)) / 0.5
    return torch.cat([encode_pose(robot_obs[..., :6]), width, joints, command], -1)                   # [..., 15]


def encode_command(target, gripper):
    """Commanded pose [..., 6] and last gripper command [..., 1] -> c [..., 7]."""
    return torch.cat([encode_pose(target), gripper], -1)


SHOWN = 5                                                    # frames at a segment's end that show success, where no rule can tell


class Recording:
    """A dataset as the world model wants it: actions shifted by one, commanded poses, proprioception, and codes where the encoder is linear.

    Frames stay on the host; batch() moves windows to the device."""

    def __init__(self, cfg, dataset, wm=None):
        self.cfg, self.ds = cfg, dataset
        robot, actions = np.array(dataset["robot_obs"]), np.array(dataset["rel_actions"])
        # CALVIN's own recordings hold the measured motion, not the command: how far the target led the arm is unknown
        self.lead = dataset.meta.get("source") != "calvin"
        target = commanded_targets(robot, actions, dataset.episodes, self.lead)                       # [N, 6]
        before = np.concatenate([np.zeros((1, 7), np.float32), actions[:-1]])                         # the action executed before the frame
        first = dataset.episodes[:, 0]
        before[first] = 0
        gripper = before[:, 6:].copy()
        gripper[first] = robot[first, 14:15]
        self.target = torch.from_numpy(target)
        self.action = torch.from_numpy(before)
        self.command = encode_command(self.target, torch.from_numpy(gripper))
        self.proprio = encode_proprio(torch.from_numpy(robot))
        self.scene = np.array(dataset["scene_obs"])
        self.codes = None
        if wm is not None and wm.codec:
            self.encode(wm)

    def has_rule(self, task):
        """Can CALVIN's rule tell success here?  It needs the scene state, and a task that it knows."""
        return self.ds.has_scene and task in TASKS

    def success(self, task, start, frames):
        """Is the task done at `frames`, seen from frame `start`?  -> bool of their common shape

        Without a rule it is done in the last five frames of a segment of that name, because whoever cut it there says so."""
        start, frames = np.broadcast_arrays(start, frames)
        if self.has_rule(task):
            return success(task, self.scene[start], self.scene[frames])
        done = np.zeros(len(self.ds), bool)
        for name, _, last in self.ds.segments:
            if name == task:
                done[last - SHOWN + 1:last + 1] = True
        return done[frames] & ~done[start]

    @torch.no_grad()
    def encode(self, wm):
        device = wm.codec.static_mean.device
        parts = []
        for a in range(0, len(self.ds), 2000):
            frames = [torch.from_numpy(np.array(self.ds[k][a:a + 2000])).to(device) for k in ("rgb_static", "rgb_gripper")]
            parts.append(wm.codec.encode(*frames).cpu())
        self.codes = torch.cat(parts)                                                                 # [N, k]

    def batch(self, frames):
        """frames [..., T] of frame numbers, wm_stride apart -> tensors on the device; action, command [..., T, stride * 7]: those that led to each frame.

        The first action of a window is erased: nothing came before it."""
        frames = np.asarray(frames)
        steps = frames[..., None] + np.arange(1 - self.cfg.wm_stride, 1)                              # [..., T, stride]
        steps[..., 0, :] = frames[..., :1]
        index, device = torch.from_numpy(frames), self.cfg.device
        out = {k: getattr(self, k)[torch.from_numpy(steps)].flatten(-2).to(device) for k in ("action", "command")}
        out["action"][..., 0, :] = 0
        out["proprio"] = self.proprio[index].to(device)
        if self.codes is not None:
            out["codes"] = self.codes[index].to(device)
        else:
            for k in ("rgb_static", "rgb_gripper"):
                out[k] = torch.from_numpy(self.ds[k][frames.reshape(-1)].reshape(*frames.shape, *self.ds[k].shape[1:])).to(device)
        return out


def commanded_targets(robot_obs, actions, episodes, lead=True):
    """Integrate the commands exactly as the simulator does: target[t+1] = advance(target[t], action[t], measured tcp[t]).  -> [N, 6] f32

    Without `lead` it is advance(tcp[t], action[t], tcp[t]).  All episodes advance together, one time step a loop."""
    target = np.zeros((len(robot_obs), 6), np.float32)
    first, lengths = episodes[:, 0], episodes[:, 1] - episodes[:, 0] + 1
    target[first] = robot_obs[first, :6]
    for t in range(lengths.max() - 1):
        now = first[lengths > t + 1] + t
        target[now + 1] = advance_target(target[now], actions[now], robot_obs[now, :6], lead)
    return target
