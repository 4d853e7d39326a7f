"""Render a scene for two cameras: 49 intensity images, 2 ms apart, become color frames and an event stream.

`frames`: 16 images per clip, each the mean of three intensity images, so fast objects are blurred. `events`: a contrast-threshold model
with microsecond time stamps. Layers of a scene move only horizontally, so one cumulative sum per layer renders all time steps at once.
"""

from __future__ import annotations

import numpy as np

from feature_alignment.demo.road_users import BODY, DARK, SHAPES, Box
from feature_alignment.demo.world import Scene
from feature_alignment.inputs.simulate import crossings

SIZE = 72  # pixels, both cameras
STEPS = 49  # intensity images per clip
STEP_US = 2_000  # between two images: a clip spans 96 ms, less than EventGPT's 100 ms
VIDEO_FRAMES = 16  # each the mean of three intensity images
CONTRAST = 0.2  # event threshold in log-intensity
SUBPIXELS = 4  # horizontal oversampling of every layer
PAN_PIXELS = 4  # camera motion, which makes static objects visible in events

_RGB = {
    "red": (0.85, 0.10, 0.10),
    "blue": (0.12, 0.25, 0.90),
    "green": (0.10, 0.65, 0.15),
    "yellow": (0.95, 0.90, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.06),
    "orange": (0.98, 0.50, 0.05),
}
_LIGHT = {"day": (1.0, 1.0, 1.0), "dusk": (0.75, 0.48, 0.36), "night": (0.16, 0.20, 0.34)}
_TRAVEL = {"slow": 11.0, "medium": 23.0, "fast": 40.0}  # pixels per clip, over the ground
_BASE_Y = {"far": 50, "near": 70}  # where wheels touch the road
_SCALE = {"far": 1.0, "near": 1.3}


class _Layer:
    """An RGBA canvas, oversampled horizontally, that slides past the camera. x and y are in pixels, y points down."""

    def __init__(self, width: int) -> None:
        self.rgb = np.zeros((SIZE, width * SUBPIXELS, 3), np.float32)
        self.alpha = np.zeros((SIZE, width * SUBPIXELS, 1), np.float32)
        self._x = (np.arange(width * SUBPIXELS) + 0.5) / SUBPIXELS
        self._y = np.arange(SIZE) + 0.5

    def box(self, x: float, y: float, w: float, h: float, rgb: tuple[float, ...]) -> None:
        cols = slice(max(0, round(x * SUBPIXELS)), max(0, round((x + w) * SUBPIXELS)))
        rows = slice(max(0, round(y)), max(0, round(y + h)))
        self.rgb[rows, cols] = rgb
        self.alpha[rows, cols] = 1.0

    def disc(self, x: float, y: float, r: float, rgb: tuple[float, ...]) -> None:
        inside = (self._y[:, None] - y) ** 2 + (self._x[None, :] - x) ** 2 <= r * r
        self.rgb[inside] = rgb
        self.alpha[inside] = 1.0

    def roof(self, x: float, y: float, w: float, h: float, rgb: tuple[float, ...]) -> None:
        """A triangle, apex up, standing on y + h."""
        down = np.clip((self._y[:, None] - y) / h, 0, 1)
        inside = (np.abs(self._x[None, :] - x - w / 2) <= down * w / 2) & (self._y[:, None] >= y) & (self._y[:, None] < y + h)
        self.rgb[inside] = rgb
        self.alpha[inside] = 1.0

    def views(self, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The camera image for left edges at `left` [t] pixels: premultiplied rgb [t, y, x, 3], alpha [t, y, x, 1]."""
        stack = np.concatenate([self.rgb * self.alpha, self.alpha], axis=2)
        total = np.concatenate([np.zeros_like(stack[:, :1]), stack.cumsum(1, dtype=np.float64)], axis=1)
        start = np.round(left * SUBPIXELS).astype(int)[:, None] + np.arange(SIZE + 1)[None, :] * SUBPIXELS
        edges = total[:, np.clip(start, 0, total.shape[1] - 1)]  # [y, t, x + 1, 4]
        image = np.diff(edges, axis=2).transpose(1, 0, 2, 3).astype(np.float32) / SUBPIXELS
        return image[..., :3], image[..., 3:]


def _draw_road_user(layer: _Layer, kind: str, x: float, lane: str, rgb: tuple[float, ...], heading: str) -> None:
    """Draw one road user whose left edge is at x [pixels]. Its shapes face right; they are mirrored if it heads left."""
    k = _SCALE[lane]
    length, _ = BODY[kind]
    ground = _BASE_Y[lane]

    def left_edge(px: float, w: float) -> float:
        return x + (k * px if heading == "right" else k * (length - px - w))

    for shape in SHAPES[kind]:
        color = rgb if shape.rgb is None else shape.rgb
        if isinstance(shape, Box):
            layer.box(left_edge(shape.x, shape.w), ground - k * shape.top, k * shape.w, max(1.0, k * shape.h), color)
        else:
            layer.disc(left_edge(shape.x, shape.w) + k * shape.w / 2, ground - k * shape.y, k * shape.r, color)


def _draw_background(layer: _Layer, s: Scene, rng: np.random.Generator, width: int) -> None:
    layer.box(0, 0, width, 34, (0.62, 0.76, 0.92))  # sky
    layer.box(0, 34, width, SIZE - 34, (0.40, 0.40, 0.42))  # road
    layer.box(0, 34, width, 1.5, (0.62, 0.60, 0.56))  # curb
    for x in range(int(rng.integers(0, 9)), width, 18):
        layer.box(x, 52, 8, 1, (0.75, 0.75, 0.72))

    def jitter(a: float) -> float:
        return float(rng.uniform(-a, a))

    phase = int(rng.integers(0, 10))
    if s.place == "city":
        for x in range(-phase, width, 20):
            top = 2 + abs(jitter(7))
            layer.box(x, top, 18, 34 - top, (0.50, 0.42, 0.40))
            for wx in range(2, 17, 5):
                for wy in range(3, 18, 6):
                    layer.box(x + wx, top + wy, 2.5, 3, (0.82, 0.80, 0.62))
    elif s.place == "forest":
        for x in range(-phase, width, 11):
            layer.box(x + 4, 14, 2.5, 20, (0.30, 0.20, 0.12))
            layer.disc(x + 5 + jitter(1), 9 + jitter(2), 6, (0.12, 0.38, 0.14))
    elif s.place == "bridge":
        layer.box(0, 24, width, 2, (0.32, 0.34, 0.40))
        layer.box(0, 31, width, 1.5, (0.32, 0.34, 0.40))
        for x in range(-phase, width, 6):
            layer.box(x, 24, 1.2, 10, (0.32, 0.34, 0.40))
        for x in range(-phase, width, 30):
            layer.box(x + 10, 0, 3, 34, (0.55, 0.25, 0.22))
    elif s.place == "highway":
        layer.box(0, 12, width, 16, (0.70, 0.70, 0.66))
        for x in range(-phase, width, 24):
            layer.box(x, 12, 1.5, 16, (0.42, 0.42, 0.40))
        layer.box(0, 29, width, 2, (0.85, 0.86, 0.88))
    elif s.place == "village":
        for x in range(-phase, width, 26):
            top = 16 + jitter(2)
            layer.box(x + 2, top, 18, 34 - top, (0.86, 0.80, 0.68))
            layer.roof(x, top - 11, 22, 11, (0.62, 0.24, 0.18))
            layer.box(x + 9, 25, 4, 9, (0.35, 0.22, 0.14))
    else:  # farm
        layer.box(0, 22, width, 12, (0.56, 0.66, 0.30))
        for x in range(-phase, width, 40):
            layer.disc(x + 12, 27, 4, (0.80, 0.70, 0.34))
        for x in range(-phase, width, 15):
            layer.box(x, 27, 1.5, 7, (0.36, 0.26, 0.18))


def _draw_landmark(layer: _Layer, kind: str, x: float) -> None:
    if kind == "signal":
        layer.box(x - 0.5, 19, 1.5, 17, DARK)
        layer.box(x - 3, 8, 6, 13, DARK)
        for y, rgb in ((10.5, (1, 0.1, 0.1)), (14.5, (1, 0.8, 0.1)), (18.5, (0.1, 0.9, 0.2))):
            layer.disc(x, y, 1.5, rgb)
    elif kind == "sign":
        layer.box(x - 0.5, 18, 1.5, 18, (0.25, 0.25, 0.25))
        layer.roof(x - 6, 8, 12, 11, (0.95, 0.95, 0.95))
        layer.roof(x - 3, 12, 6, 6, (0.8, 0.1, 0.1))
    elif kind == "bench":
        layer.box(x - 8, 25, 16, 2, (0.20, 0.10, 0.04))
        layer.box(x - 8, 29, 16, 2.5, (0.20, 0.10, 0.04))
        layer.box(x - 7, 29, 2, 7, DARK)
        layer.box(x + 5, 29, 2, 7, DARK)
    elif kind == "lamp":
        layer.box(x - 0.8, 3, 2, 33, (0.12, 0.12, 0.14))
        layer.box(x, 3, 9, 1.6, (0.12, 0.12, 0.14))
        layer.box(x + 6, 4, 4, 3, (1.0, 1.0, 0.75))
    elif kind == "mailbox":
        layer.box(x - 1, 27, 2, 9, DARK)
        layer.box(x - 5, 18, 10, 10, (0.98, 0.98, 0.98))
        layer.box(x - 4, 21, 8, 2, DARK)


def render(s: Scene, parked_color: str | None = None) -> np.ndarray:
    """Intensity images of a scene: float32 [49, 72, 72, 3], linear in [0, 1], 2 ms apart.

    Args:
        s: Scene.
        parked_color: Color of the parked vehicle; by default chosen by the scene's seed.
    """
    rng = np.random.default_rng([s.seed, 1])
    t = np.linspace(0.0, 1.0, STEPS)
    pan = PAN_PIXELS * t
    width = SIZE + PAN_PIXELS + 2
    back = _Layer(width)
    _draw_background(back, s, rng, width)
    if s.landmark != "none":
        _draw_landmark(back, s.landmark, (18 if s.side == "left" else 58) + float(rng.uniform(-4, 4)))
    image, _ = back.views(pan)

    def overlay(layer: _Layer, left: np.ndarray) -> None:
        nonlocal image
        rgb, alpha = layer.views(left)
        image = image * (1 - alpha) + rgb

    if s.parked != "none":
        lane = "near" if s.lane == "far" else "far"
        room = SIZE - 4 - _SCALE[lane] * BODY[s.parked][0]
        layer = _Layer(width)
        any_color = sorted(_RGB)[int(rng.integers(len(_RGB)))]  # always drawn, so that later random draws do not change
        color = _RGB[parked_color or any_color]
        _draw_road_user(layer, s.parked, float(rng.uniform(6, room)), lane, color, ("left", "right")[int(rng.integers(2))])
        overlay(layer, pan)

    travel = _TRAVEL[s.speed] * float(rng.uniform(0.9, 1.1))
    length = _SCALE[s.lane] * BODY[s.kind][0]
    center = SIZE / 2 + float(rng.uniform(-5, 5))  # its position halfway through the clip
    margin = 80
    layer = _Layer(SIZE + 2 * margin)
    for i in range(2 if s.number == "two" else 1):
        _draw_road_user(layer, s.kind, margin - i * (length + 6), s.lane, _RGB[s.colour], s.direction)
    if s.number == "two":
        center += (length + 6) / 2
    sign = 1.0 if s.direction == "right" else -1.0
    rear = center - length / 2 + (sign * travel - PAN_PIXELS) * (t - 0.5)
    overlay(layer, margin - rear)
    image = image * np.asarray(_LIGHT[s.light], np.float32)
    return np.clip(image, 0.0, 1.0, out=image)


def frames(intensity: np.ndarray, seed: int) -> np.ndarray:
    """Frames of the color camera, with sensor noise.

    Args:
        intensity: [49, h, w, 3] float32, from `render`.
        seed: Of the scene.

    Returns:
        [16, h, w, 3] uint8.
    """
    exposed = intensity[: VIDEO_FRAMES * 3].reshape(VIDEO_FRAMES, 3, SIZE, SIZE, 3).mean(1)
    noise = np.random.default_rng([seed, 2]).normal(0.0, 0.008, exposed.shape)
    values: np.ndarray = np.clip(np.sqrt(exposed) * 255 + noise * 255, 0, 255)  # square root: a camera's gamma
    return values.astype(np.uint8)


def events(intensity: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Events of the event camera.

    Contrast-threshold model: log-intensity is linear between two images; a pixel fires each time it has changed by CONTRAST since its last
    event. A few background events per clip simulate sensor noise.

    Args:
        intensity: [49, h, w, 3] float32, from `render`.
        seed: Of the scene.

    Returns:
        x, y, p (1 = brighter) uint8; t uint32, sorted microseconds.
    """
    rng = np.random.default_rng([seed, 3])
    log_i = np.log(intensity @ np.asarray([0.299, 0.587, 0.114], np.float32) + 2e-3)
    level = log_i[0] + rng.uniform(-0.5, 0.5, log_i[0].shape) * CONTRAST  # the last event came some time before the clip
    xs, ys, ps, ts = [], [], [], []
    for step in range(1, len(log_i)):
        before, after = log_i[step - 1], log_i[step]
        x, y, brighter, fraction = crossings(before, after, level, CONTRAST)
        xs.append(x)
        ys.append(y)
        ps.append(brighter)
        ts.append((step - 1 + fraction) * STEP_US)
    noise = 40
    xs.append(rng.integers(0, SIZE, noise))
    ys.append(rng.integers(0, SIZE, noise))
    ps.append(rng.integers(0, 2, noise))
    ts.append(rng.uniform(0, (STEPS - 1) * STEP_US, noise))
    t = np.concatenate(ts)
    order = np.argsort(t, kind="stable")
    fields = {name: np.concatenate(parts)[order].astype(np.uint8) for name, parts in (("x", xs), ("y", ys), ("p", ps))}
    return {**fields, "t": t[order].astype(np.uint32)}
