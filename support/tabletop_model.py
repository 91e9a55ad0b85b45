"""tabletop_model.py: the desk and the arm as generated URDF text and meshes.

Few triangles, because the software renderer pays for each."""
import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pybullet_data

TCP_OFFSET = 0.14                            # tcp beyond the hand frame, along the tool: m


def euler_matrix(euler):
    """Extrinsic xyz Euler angles [3] -> rotation matrix [3, 3]."""
    cr, cp, cy = np.cos(euler)
    sr, sp, sy = np.sin(euler)
    return np.array([[cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                     [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                     [-sp, cp * sr, cp * cr]])


WOOD = (0.66, 0.47, 0.29)
DARK_WOOD = (0.46, 0.31, 0.19)
PALE_WOOD = (0.78, 0.60, 0.40)
INSIDE = (0.30, 0.20, 0.13)
LEGS = (0.40, 0.27, 0.17)
DRAWER_GRIP = (0.22, 0.22, 0.25)
SLIDER_GRIP = (0.16, 0.25, 0.45)
SWITCH_GRIP = (0.45, 0.1, 0.4)
BLACK = (0.05, 0.05, 0.05)
GREEN = (0.0, 0.9, 0.1)
YELLOW = (1.0, 0.9, 0.0)
LAMP_OFF = (0.97, 0.97, 0.97)
RED = (0.9, 0.05, 0.05)
BLUE = (0.05, 0.1, 0.9)
PINK = (1.0, 0.35, 0.75)
BLOCKS = (  # size, colour
    ((0.056, 0.04, 0.04), RED),
    ((0.04, 0.04, 0.04), BLUE),
    ((0.08, 0.04, 0.04), PINK),
)
CORNERS = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
FLAT = (0, 0, 0)
TILTED = (-np.pi / 6, 0, 0)                  # the cabinet's front leans back by 30 degrees


def panel(x0, x1, n0, n1, u0, u1):
    """A box on the tilted cabinet front -> centre, size, rpy.

    Across (x), out of the panel (n), up along it (u)."""
    n = (n0 + n1) / 2
    u = (u0 + u1) / 2
    centre = ((x0 + x1) / 2, 0.0212 - 0.866 * n + 0.5 * u, 0.487 + 0.5 * n + 0.866 * u)
    return centre, (x1 - x0, n1 - n0, u1 - u0), TILTED


def box(x0, x1, y0, y1, z0, z1):
    return ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2), (x1 - x0, y1 - y0, z1 - z0), FLAT


# link -> colour -> boxes, everything at joint position 0
DESK = {
    "desk": {
        WOOD: [box(-0.44, 0.44, -0.18, 0.18, 0.40, 0.44), panel(-0.44, -0.36, -0.02, 0, -0.054, 0.165)],
        INSIDE: [box(-0.44, 0.44, 0.16, 0.18, 0.44, 0.63)],
        DARK_WOOD: [box(-0.44, 0.44, 0.11, 0.18, 0.63, 0.649)],
        PALE_WOOD: [panel(0.16, 0.44, -0.02, 0, -0.054, 0.165)],
        LEGS: [box(-0.42, -0.36, -0.16, 0.16, 0, 0.40), box(0.38, 0.44, -0.16, 0.16, 0, 0.40)],
    },
    "slider": {
        DARK_WOOD: [panel(-0.08, 0.16, -0.02, 0, -0.05, 0.165)],
        SLIDER_GRIP: [
            panel(0.019, 0.061, 0, 0.045, -0.012, 0.012),
            panel(0.019, 0.061, 0, 0.045, 0.153, 0.177),
            panel(0.019, 0.061, 0.033, 0.059, -0.012, 0.177),
        ],
    },
    "drawer": {
        PALE_WOOD: [box(0, 0.36, -0.182, -0.157, 0.30, 0.395)],
        WOOD: [box(0.02, 0.34, -0.157, 0.10, 0.31, 0.32)],
        DARK_WOOD: [
            box(0, 0.02, -0.157, 0.10, 0.31, 0.38),
            box(0.34, 0.36, -0.157, 0.10, 0.31, 0.38),
        ],
        DRAWER_GRIP: [
            box(0.06, 0.30, -0.261, -0.238, 0.34, 0.38),
            box(0.06, 0.084, -0.238, -0.182, 0.34, 0.38),
            box(0.276, 0.30, -0.238, -0.182, 0.34, 0.38),
        ],
    },
    "button": {BLACK: [box(-0.152, -0.088, -0.152, -0.088, 0.452, 0.486)]},
    "switch": {
        SWITCH_GRIP: [
            panel(0.24, 0.36, 0.010, 0.031, 0.02, 0.049),
            panel(0.24, 0.255, 0, 0.010, 0.02, 0.049),
            panel(0.345, 0.36, 0, 0.010, 0.02, 0.049),
        ],
    },
    "led": {LAMP_OFF: [box(-0.203, -0.037, 0.137, 0.183, 0.645, 0.670)]},
    "bulb": {LAMP_OFF: [box(0.269, 0.331, 0.129, 0.191, 0.645, 0.700)]},
}
JOINTS = {  # axis, mass (kg), travel (m); in the order of scene_obs
    "slider": ((-1, 0, 0), 1.54, 0.28),
    "drawer": ((0, -1, 0), 4.23, 0.22),
    "button": ((0, 0, -1), 0.15, 0.02),
    "switch": ((0, 0.5, 0.866), 0.24, 0.088),
}


def unit_normal(normal):
    """About normal / |normal|, of float32 length exactly 1.

    The renderer normalises in place with every picture, and any other length would flip the last bit each
    time, and with it a pixel now and then."""
    rng = np.random.default_rng(0)
    while True:
        unit = (normal / np.linalg.norm(normal)).astype(np.float32)
        if all((a * a + b * b) + c * c == 1 for a, b, c in itertools.permutations(unit)):
            return unit
        normal = unit + rng.normal(0, 1e-4, 3)


def hulls_obj(clouds, corners=14):
    """OBJ text of convex meshes, one for each cloud of points [N, 3].

    Of large ones only the extremes in a few directions."""
    directions = np.random.default_rng(0).normal(size=(3, corners))
    text = ""
    count = 1
    faces = 0
    for points in clouds:
        if len(points) > corners:
            points = np.unique(points[(points @ directions).argmax(0)], axis=0)
        # no four in a plane: no face twice
        points = points + 1e-6 * np.sin(np.arange(points.size)).reshape(-1, 3)
        text += "".join("v {:.7f} {:.7f} {:.7f}\n".format(*v) for v in points)
        triples = np.array([t for t in itertools.permutations(range(len(points)), 3) if t[0] == min(t)])
        a, b, c = points[triples].transpose(1, 0, 2)                        # [N, 3] each
        normals = np.cross(b - a, c - a)
        above = ((points - a[:, None]) * normals[:, None]).sum(-1).max(1)
        outside = above < 1e-12                          # a face is a triple with no point above it
        for triple, normal in zip(triples[outside], normals[outside]):
            faces += 1
            text += "vn {:.9g} {:.9g} {:.9g}\nf ".format(*unit_normal(normal))
            text += " ".join(f"{v + count}//{faces}" for v in triple) + "\n"
        count += len(points)
    return text


def desk_urdf():
    """The desk: a fixed base, four sliding joints, two lamps. -> {file name: text} of its URDF and meshes."""
    text = "<robot name='desk'>"
    files = {}
    for name, parts in DESK.items():
        axis, mass, upper = JOINTS.get(name, (None, 0, 0))
        text += f"<link name='{name}'><contact><lateral_friction value='0.5'/></contact>"
        text += f"<inertial><mass value='{mass}'/>"
        text += "<inertia ixx='.01' iyy='.01' izz='.01' ixy='0' ixz='0' iyz='0'/></inertial>"
        for number, (colour, boxes) in enumerate(parts.items()):
            mesh = f"{name}{number}"
            corners = [CORNERS * size @ euler_matrix(np.array(rpy)).T + centre for centre, size, rpy in boxes]
            files[f"{mesh}.obj"] = hulls_obj(corners)
            text += f"<visual><geometry><mesh filename='{mesh}.obj'/></geometry><material name='{mesh}'>"
            text += "<color rgba='{} {} {} 1'/></material></visual>".format(*colour)
        for centre, size, rpy in itertools.chain(*parts.values()):
            text += "<collision><origin xyz='{} {} {}' rpy='{} {} {}'/>".format(*centre, *rpy)
            text += "<geometry><box size='{} {} {}'/></geometry></collision>".format(*size)
        text += "</link>"
        if name != "desk":
            kind = "prismatic" if axis else "fixed"
            text += f"<joint name='{name}' type='{kind}'><parent link='desk'/><child link='{name}'/>"
            text += "<axis xyz='{} {} {}'/>".format(*(axis or (0, 0, 1)))
            text += f"<limit lower='0' upper='{upper}' effort='100' velocity='10'/></joint>"
    return {**files, "desk.urdf": text + "</robot>"}


def panda_urdf():
    """A low-polygon Panda with CALVIN's long fingers. -> {file name: text} of its URDF and meshes."""
    source = Path(pybullet_data.getDataPath(), "franka_panda")
    files = {}
    text = (source / "panda.urdf").read_text()
    for mesh in set(re.findall(r"meshes/collision/(\w+)\.obj", text)):
        lines = (source / "meshes" / "collision" / (mesh + ".obj")).read_text().splitlines()
        points = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], float)
        if mesh == "finger":                 # a wedge 0.097 m long, inner face at y = 0: half width, y, z
            profile = (
                (0.011, 0, 0),
                (0.011, 0.030, 0.0085),
                (0.011, 0.020, 0.0465),
                (0.0105, 0.010, 0.0885),
                (0.006, 0.005, 0.0973),
                (0.0085, 0, 0.092),
            )
            points = np.array([(x * side, y, z) for x, y, z in profile for side in (-1, 1)])
        files[mesh + ".obj"] = hulls_obj([points])
    text = re.sub(r"package://meshes/\w+/(\w+)\.obj", r"\1.obj", text)
    # only the wrist, the hand and the fingers can touch the desk; the upper arm never reaches it
    for link in range(5):
        start = rf"(<link name=\"panda_link{link}\">.*?)"
        text = re.sub(start + "<collision>.*?</collision>", r"\1", text, flags=re.S)
    for link in range(3):                                # no camera ever sees the base
        start = rf"(<link name=\"panda_link{link}\">.*?)"
        text = re.sub(start + "<visual>.*?</visual>", r"\1", text, flags=re.S)
    text = text.replace('xyz="0 0 0.105"', f'xyz="0 0 {TCP_OFFSET}"')     # its "grasptarget" becomes the tcp
    return {**files, "panda.urdf": text}


@functools.cache
def urdf_files():
    return {**panda_urdf(), **desk_urdf()}
