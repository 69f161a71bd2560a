/**
 * Images as the net takes them, to the pixel what timm's transform gives in Python: PIL's bicubic resize of the shorter
 * side, a crop of the centre, mean and standard deviation. The browser turns a photo as its EXIF data say, which timm
 * leaves to its user. Where an image is more than twice as high as wide, pixels of Pillow 13 differ by 1.
 */
import { Failure } from './failure.js';

const LARGEST = 25e6; // bytes of a file
const STRIP = 256; // rows read at once: phones have no canvas for a whole photo
const BITS = 22; // of a weight's fraction, as in PIL

/** Decode a file. Raises a Failure if it is not an image that this browser reads. */
export async function decode(file) {
  if (file.size > LARGEST) {
    const size = `${(file.size / 1e6).toFixed(0)} MB`;
    throw new Failure(`This file is too large: ${size}.`, `Take an image of at most ${LARGEST / 1e6} MB.`);
  }
  try {
    return await createImageBitmap(file, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
  } catch {
    if (await isHeic(file)) {
      throw new Failure('This browser cannot read HEIC photos.', 'Save the photo as JPEG or PNG, and take that.');
    }
    throw new Failure('This is not an image that the browser can read.', 'Take a JPEG, PNG, WebP or GIF file.');
  }
}

async function isHeic(file) {
  const start = String.fromCharCode(...new Uint8Array(await file.slice(4, 12).arrayBuffer()));
  return /^ftyp(hei|hev|mif|msf)/.test(start);
}

/** The `size` x `size` pixels in the middle of an image whose shorter side becomes `resize`: RGBA, 4 bytes a pixel. */
export function prepare(bitmap, { size, resize }) {
  const { width, height } = bitmap;
  const shorter = Math.min(width, height);
  const columns = weigh(width, Math.floor((resize * width) / shorter), size);
  const rows = weigh(height, Math.floor((resize * height) / shorter), size);
  const first = rows[0].start;
  const last = rows[size - 1].start + rows[size - 1].weights.length;

  // PIL resizes the rows, rounds to bytes, and then resizes the columns
  const narrow = new Uint8ClampedArray((last - first) * size * 4);
  const canvas = Object.assign(document.createElement('canvas'), { width, height: Math.min(STRIP, last - first) });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  for (let top = first; top < last; top += STRIP) {
    const count = Math.min(STRIP, last - top);
    context.clearRect(0, 0, width, count);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    const { data } = context.getImageData(0, 0, width, count);
    for (let y = 0; y < count; y++) {
      for (let x = 0; x < size; x++) {
        const from = 4 * (y * width + columns[x].start);
        average(data, from, 4, columns[x].weights, narrow, 4 * ((top - first + y) * size + x));
      }
    }
  }
  const pixels = new Uint8ClampedArray(size * size * 4);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const from = 4 * ((rows[y].start - first) * size + x);
      average(narrow, from, 4 * size, rows[y].weights, pixels, 4 * (y * size + x));
    }
  }
  return pixels;
}

/** The weighted sum of RGB pixels, `step` bytes apart, rounded to a byte. */
function average(source, from, step, weights, target, to) {
  const half = 1 << (BITS - 1);
  let [r, g, b] = [half, half, half];
  for (let i = 0, at = from; i < weights.length; i++, at += step) {
    r += source[at] * weights[i];
    g += source[at + 1] * weights[i];
    b += source[at + 2] * weights[i];
  }
  target[to] = r >> BITS; // clamped to 0 ... 255 by the array
  target[to + 1] = g >> BITS;
  target[to + 2] = b >> BITS;
  target[to + 3] = 255;
}

/**
 * Weights of the `size` pixels in the middle when `from` pixels become `to`: precompute_coeffs of PIL's Resample.c.
 * A kernel as wide as the reduction is smoothed over, in fixed point. Without a change of size each pixel is itself.
 */
function weigh(from, to, size) {
  const offset = roundHalfToEven((to - size) / 2);
  if (from === to) {
    return Array.from({ length: size }, (_, i) => ({ start: i + offset, weights: [1 << BITS] }));
  }
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: size }, (_, i) => {
    const center = (i + offset + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const end = Math.min(from, Math.trunc(center + 2 * stretch + 0.5));
    const values = Array.from({ length: end - start }, (_, j) => bicubic((j + start - center + 0.5) * (1 / stretch)));
    const sum = values.reduce((a, b) => a + b, 0);
    return { start, weights: values.map((v) => Math.trunc((v / sum) * (1 << BITS) + Math.sign(v) * 0.5)) };
  });
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** Python's round, by which the crop is placed. */
function roundHalfToEven(x) {
  return x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** Normalized channels, one after the other. */
export function normalize(pixels, { mean, std }) {
  const count = pixels.length / 4;
  return Float32Array.from({ length: 3 * count }, (_, i) => {
    const channel = Math.floor(i / count);
    return (pixels[4 * (i % count) + channel] / 255 - mean[channel]) / std[channel];
  });
}
