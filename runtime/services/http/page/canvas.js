// A slice on a canvas: windowed, with masks over it, a cross, and what is being drawn.

export const PALETTE = ["#f59e0b", "#22b8f0", "#7ac943", "#e8559d", "#a78bfa", "#f4d03f", "#2ac3a2", "#ff7161"];
export const colourOf = (index) => PALETTE[index % PALETTE.length];

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.slice = null;      // {width, height, channels, pixels}
    this.masks = new Map(); // name -> bytes
    this.cross = null;      // [x, y] in pixels of the slice
    this.stretch = 1;       // height of a pixel, by its width
    this.shape = null;      // what is being drawn: {kind, points}
    this.aspect = { low: 0, high: 1, opacity: 0.35 };
    this.colour = () => "#ffffff";
    this.hidden = new Set();
    this.ground = document.createElement("canvas");
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(slice, stretch) {
    this.slice = slice;
    this.stretch = stretch;
    if (!this.cross || this.cross[0] >= slice.width || this.cross[1] >= slice.height)
      this.cross = [Math.floor(slice.width / 2), Math.floor(slice.height / 2)];
  }

  // Where the slice lies on the canvas.
  get place() {
    const { width, height } = this.canvas;
    const scale = Math.min(width / this.slice.width, height / (this.slice.height * this.stretch));
    return {
      sx: scale, sy: scale * this.stretch,
      left: (width - this.slice.width * scale) / 2,
      top: (height - this.slice.height * scale * this.stretch) / 2,
    };
  }

  // The pixel under the pointer, or null.
  pixel(event) {
    if (!this.slice) return null;
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    const { sx, sy, left, top } = this.place;
    const x = Math.floor(((event.clientX - box.left) * ratio - left) / sx);
    const y = Math.floor(((event.clientY - box.top) * ratio - top) / sy);
    return x >= 0 && y >= 0 && x < this.slice.width && y < this.slice.height ? [x, y] : null;
  }

  render() {
    const { width, height, channels: count, pixels } = this.slice;
    this.ground.width = width;
    this.ground.height = height;
    const context = this.ground.getContext("2d");
    const image = context.createImageData(width, height);
    const { low, high, opacity } = this.aspect;
    const gain = 255 / Math.max(high - low, 1e-9);
    const shown = [...this.masks].filter(([name]) => !this.hidden.has(name))
      .map(([name, mask]) => [channels(this.colour(name)), mask]);
    for (let i = 0, at = 0; i < width * height; i++, at += 4) {
      for (let c = 0; c < 3; c++)
        image.data[at + c] = (pixels[i * count + (count === 3 ? c : 0)] - low) * gain;
      image.data[at + 3] = 255;
      for (const [rgb, mask] of shown) {
        if (!mask[i]) continue;
        const x = i % width;
        const edge = x === 0 || x === width - 1 || !mask[i - 1] || !mask[i + 1]
          || !mask[i - width] || !mask[i + width];
        const share = edge ? Math.min(1, opacity * 2.5) : opacity;
        for (let c = 0; c < 3; c++)
          image.data[at + c] = image.data[at + c] * (1 - share) + rgb[c] * share;
      }
    }
    context.putImageData(image, 0, 0);
    this.draw();
  }

  draw() {
    const box = this.canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height)
      [this.canvas.width, this.canvas.height] = [width, height];
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    if (!this.slice || !this.ground.width) return;
    const { sx, sy, left, top } = this.place;
    context.imageSmoothingEnabled = sx < 3;
    context.drawImage(this.ground, left, top, this.slice.width * sx, this.slice.height * sy);
    const at = ([x, y]) => [left + (x + 0.5) * sx, top + (y + 0.5) * sy];
    context.lineWidth = 1.5 * ratio;
    if (this.cross) {
      const [x, y] = at(this.cross);
      context.strokeStyle = "#ffffffb0";
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + dx * 5 * ratio, y + dy * 5 * ratio);
        context.lineTo(x + dx * 14 * ratio, y + dy * 14 * ratio);
      }
      context.stroke();
    }
    if (this.shape) {
      const { kind, points, colour, radius } = this.shape;
      context.strokeStyle = context.fillStyle = colour;
      const ends = points.map(at);
      if (kind === "box") {
        const [[x0, y0], [x1, y1]] = [ends[0], ends.at(-1)];
        context.strokeRect(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0));
      } else {
        context.lineWidth = radius ? Math.max(2, radius * 2 * sx) : 3 * ratio;
        context.lineCap = context.lineJoin = "round";
        context.globalAlpha = radius ? 0.5 : 1;
        context.beginPath();
        ends.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
        if (ends.length === 1) context.lineTo(ends[0][0] + 0.1, ends[0][1]);
        context.stroke();
        context.globalAlpha = 1;
      }
    }
  }
}

// The pixels within a radius of a line through points: {x, y, width, height, mask}, cut at the edges.
export function stroke(points, radius, slice) {
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.max(0, Math.min(...xs) - radius), x1 = Math.min(slice.width - 1, Math.max(...xs) + radius);
  const y0 = Math.max(0, Math.min(...ys) - radius), y1 = Math.min(slice.height - 1, Math.max(...ys) + radius);
  const width = x1 - x0 + 1, height = y1 - y0 + 1;
  const mask = new Uint8Array(width * height);
  const stamp = (cx, cy) => {
    for (let y = Math.max(y0, Math.ceil(cy - radius)); y <= Math.min(y1, cy + radius); y++)
      for (let x = Math.max(x0, Math.ceil(cx - radius)); x <= Math.min(x1, cx + radius); x++)
        if ((x - cx) ** 2 + (y - cy) ** 2 <= (radius - 0.5) ** 2 + 0.25) mask[(y - y0) * width + x - x0] = 1;
  };
  points.forEach((point, i) => {
    const before = points[Math.max(0, i - 1)];
    const steps = Math.max(1, Math.ceil(Math.hypot(point[0] - before[0], point[1] - before[1])));
    for (let s = 0; s <= steps; s++)
      stamp(before[0] + ((point[0] - before[0]) * s) / steps, before[1] + ((point[1] - before[1]) * s) / steps);
  });
  return { x: x0, y: y0, width, height, mask };
}
