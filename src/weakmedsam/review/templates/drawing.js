// Volumes as typed arrays, and planes through them as pictures.
"use strict";

const rgb = COLOURS.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

class Volume {
  constructor(buffer, shape) {
    this.shape = shape;
    const bytes = buffer.byteLength / shape.reduce((a, b) => a * b, 1);
    this.values = bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
  }
}

// Width, height, and the place in a (D, S, S) volume of a plane's pixel (i, j); `up`: the first slice is the lowest row.
function planeOf(kind, shape, at, up) {
  const [depth, size] = shape, slice = (j) => (up ? depth - 1 - j : j);
  if (kind === "slice") return { width: size, height: size, place: (i, j) => (at.z * size + j) * size + i };
  if (kind === "rows") return { width: size, height: depth, place: (i, j) => (slice(j) * size + at.y) * size + i };
  return { width: size, height: depth, place: (i, j) => (slice(j) * size + i) * size + at.x };
}

function drawImage(pixels, plane, image, low, high) {
  const span = Math.max(1, high - low);
  for (let j = 0, k = 0; j < plane.height; j++)
    for (let i = 0; i < plane.width; i++, k += 4) {
      const grey = (255 * (image.values[plane.place(i, j)] - low)) / span;
      pixels[k] = pixels[k + 1] = pixels[k + 2] = grey; // clamped by the array
      pixels[k + 3] = 255;
    }
}

function blend(pixels, k, colour, share) {
  for (let c = 0; c < 3; c++) pixels[k + c] += share * (colour[c] - pixels[k + c]);
}

function fillClasses(pixels, plane, volume, share) {
  for (let j = 0, k = 0; j < plane.height; j++)
    for (let i = 0; i < plane.width; i++, k += 4) {
      const id = volume.values[plane.place(i, j)];
      if (id) blend(pixels, k, rgb[(id - 1) % rgb.length], share);
    }
}

// Lines between pixels of different classes, on the canvas, so that they are as thin for small frames as for large ones.
function outlineClasses(pen, frame, plane, volume, dash, ratio) {
  const at = (i, j) => (i < 0 || j < 0 || i >= plane.width || j >= plane.height ? 0 : volume.values[plane.place(i, j)]);
  const paths = {};
  const line = (id, i, j, across) => {
    const path = (paths[id] = paths[id] || new Path2D());
    const x = frame.left + i * frame.stepX, y = frame.top + j * frame.stepY;
    path.moveTo(x, y);
    path.lineTo(x + across * frame.stepX, y + (1 - across) * frame.stepY);
  };
  for (let j = 0; j < plane.height; j++)
    for (let i = 0; i < plane.width; i++) {
      const id = at(i, j);
      if (!id) continue;
      if (at(i - 1, j) !== id) line(id, i, j, 0);
      if (at(i + 1, j) !== id) line(id, i + 1, j, 0);
      if (at(i, j - 1) !== id) line(id, i, j, 1);
      if (at(i, j + 1) !== id) line(id, i, j + 1, 1);
    }
  pen.save();
  pen.lineWidth = 2 * ratio;
  pen.setLineDash(dash.map((length) => length * ratio));
  for (const [id, path] of Object.entries(paths)) {
    pen.strokeStyle = COLOURS[(id - 1) % COLOURS.length];
    pen.stroke(path);
  }
  pen.restore();
}

// Of one class, (D, C, h, w) on coarser cells.
function drawActivation(pixels, plane, volume, size, c, share) {
  const [, classes, h, w] = volume.shape;
  for (let j = 0, k = 0; j < plane.height; j++)
    for (let i = 0; i < plane.width; i++, k += 4) {
      const place = plane.place(i, j), x = place % size, y = Math.floor(place / size) % size, z = Math.floor(place / size ** 2);
      const cell = ((z * classes + c) * h + Math.floor((y * h) / size)) * w + Math.floor((x * w) / size);
      const value = volume.values[cell] / 255;
      blend(pixels, k, [255, 235 * value, 60], share * 1.6 * value * value);
    }
}
