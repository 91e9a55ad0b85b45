"""linear.py: two linear methods in closed form: principal components of frames, and likeness."""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.files import InputError

FITTED_ON = 5000                                            # frames, at most
AT_ONCE = 250                                               # frames: more leave the cache, twice the time


class LinearCodec(nn.Module):
    """The closed-form linear autoencoder: principal components of the frames.  They are orthonormal, so a
    squared error on codes is one on pixels but for what no component holds, which no update can change: the
    image loss, at a fraction of the price of convolutions on a CPU."""

    def __init__(self, cfg):
        super().__init__()
        self.pixels = 3 * cfg.image_size ** 2
        sizes = {"static": cfg.wm_codes, "gripper": cfg.wm_codes // 2}
        for name, k in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(self.pixels))
            self.register_buffer(f"{name}_basis", torch.zeros(self.pixels, k))
            self.register_buffer(f"{name}_std", torch.ones(k))
        self.sizes = list(sizes.values())
        self.size = sum(self.sizes)

    def fit(self, dataset, seed):
        """Learn both cameras' components from up to FITTED_ON frames of a recording, none held out."""
        frames = np.concatenate([np.arange(a, b + 1) for a, b in dataset.split()[0]])
        some = np.random.default_rng(seed).choice(frames, min(FITTED_ON, len(frames)), replace=False)
        for name in ("static", "gripper"):
            frames = torch.from_numpy(dataset[f"rgb_{name}"][np.sort(some)])
            self.fit_camera(name, frames.to(self.static_mean.device))

    def fit_camera(self, name, frames):
        """frames [N, S, S, 3] u8, a sample of the recording."""
        x = frames.flatten(1).float() / 127.5 - 1                                         # [N, pixels]
        mean = x.mean(0)
        k = getattr(self, f"{name}_std").numel()
        if k > len(x):
            raise InputError(f"{k} components of {len(x)} frames that are not held out: give --wm_codes "
                             f"{len(x)} or fewer")
        _, s, v = torch.svd_lowrank(x - mean, q=min(k + 16, len(x)), niter=3)
        for key, value in (("mean", mean), ("basis", v[:, :k]), ("std", s[:k] / math.sqrt(len(x)))):
            getattr(self, f"{name}_{key}").copy_(value)

    def encode(self, static, gripper):
        """u8 frames [..., S, S, 3] of both cameras -> codes [..., size]: sums over pixels of -1..1."""
        codes = []
        for name, frames in (("static", static), ("gripper", gripper)):
            mean, basis = getattr(self, f"{name}_mean"), getattr(self, f"{name}_basis")
            pieces = frames.reshape(-1, self.pixels).split(AT_ONCE)
            parts = [((x.float() / 127.5 - 1) - mean) @ basis for x in pieces]            # [n, k] each
            codes.append(torch.cat(parts).reshape(*frames.shape[:-3], -1))
        return torch.cat(codes, -1)                                                       # [..., size]

    def codes_of(self, obs):
        """The codes of an observation that has them, or both frames of which they are."""
        return obs["codes"] if "codes" in obs else self.encode(obs["rgb_static"], obs["rgb_gripper"])

    def whiten(self, codes):
        """Codes for a network's input.  Square-root whitening lifts small things (a lamp) without shouting
        noise.

        The largest component gets a std of 3; a camera that shows nothing has std 0."""
        std = torch.cat([self.static_std, self.gripper_std])
        return codes / (std * std.max()).sqrt().clamp(min=1e-6) * 3

    def decode(self, codes):
        """codes -> two images [..., S, S, 3] in -1..1."""
        side = int(math.sqrt(self.pixels // 3))
        images = []
        for name, part in zip(("static", "gripper"), codes.split(self.sizes, -1)):
            pixels = part @ getattr(self, f"{name}_basis").T + getattr(self, f"{name}_mean")
            images.append(pixels.unflatten(-1, (side, side, 3)))
        return images


def likeness(near, every):
    """How much like the rows of near [M, E] are those of every [N, E]?  -> [N], higher is more alike.

    A ridge regression that tells the two apart, both weighing the same."""
    x = F.pad(torch.cat([near, every]), (0, 1), value=1.0).double()
    y = torch.arange(len(x), device=x.device) < len(near)
    weight = torch.where(y, len(every) / len(near), 1.0).double()[:, None]
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    score = x @ torch.linalg.solve((x * weight).T @ x + ridge, (x * weight).T @ y.double())
    return score[len(near):]
