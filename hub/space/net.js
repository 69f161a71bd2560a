/** Nets in onnxruntime-web. Nothing is run that does not have the hash which is written here or in nets.json. */
import { Failure } from './failure.js';

const RUNTIME = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/';
// The smallest build that runs the nets, with its loader inside
const SCRIPT = {
  file: `${RUNTIME}ort.wasm.bundle.min.mjs`,
  integrity: 'sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG',
};
const WASM = {
  file: `${RUNTIME}ort-wasm-simd-threaded.wasm`,
  integrity: 'sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM',
};

/** A function that does something once, and again only after it failed: then it is told that it is not the first time. */
function once(action) {
  const done = new Map();
  let failed = false;
  return (key) => {
    if (!done.has(key)) {
      const promise = action(key, failed).catch((error) => {
        done.delete(key);
        failed = true;
        throw error;
      });
      done.set(key, promise);
    }
    return done.get(key);
  };
}

/** Bytes of a file with this hash, past the cache if it failed before. */
async function download({ file, integrity }, failed) {
  const name = file.split('/').at(-1);
  try {
    const response = await fetch(file, { integrity, cache: failed ? 'reload' : 'default' });
    if (response.ok) return await response.arrayBuffer();
  } catch {
    // The browser does not tell a wrong hash from a lost connection
  }
  const status = await fetch(file, { method: 'HEAD', cache: 'no-store' }).then((r) => r.status, () => 0);
  if (status === 200) {
    throw new Failure(`${name} is not the file that this page was made with.`, 'It was cut off or changed. Try again.', true);
  }
  const reason = status ? `The server answers ${status}.` : 'Are you online? A blocker may stop it, too.';
  throw new Failure(`${name} could not be loaded.`, reason, true);
}

/** onnxruntime-web, and how many bytes it has. */
export const loadRuntime = once(async (_, failed) => {
  if (typeof WebAssembly !== 'object') {
    const advice = 'Take another browser, or one whose protection mode does not forbid it.';
    throw new Failure('This browser has no WebAssembly, in which the net runs.', advice);
  }
  const [script, wasm] = await Promise.all([download(SCRIPT, failed), download(WASM, failed)]);
  const address = URL.createObjectURL(new Blob([script], { type: 'text/javascript' }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = 1; // more need headers that a static Space does not send
  return { ort, bytes: script.byteLength + wasm.byteLength };
});

/** What the page shows: the nets, the classes, the samples. */
export const loadSettings = once(async () => {
  try {
    const response = await fetch('nets.json', { cache: 'no-cache' });
    return await response.json();
  } catch {
    throw new Failure('The list of nets could not be loaded.', 'Are you online?', true);
  }
});

/** Open one of the nets of nets.json. Gives a function from an image to probabilities and milliseconds. */
export const open = once(async (net, failed) => {
  const [{ ort, bytes }, model] = await Promise.all([loadRuntime(), download(net, failed)]);
  let session;
  try {
    // The runtime's own optimisation takes longer than it saves: the nets are folded, and run as fast as they are
    session = await ort.InferenceSession.create(model, {
      executionProviders: ['wasm'],
      graphOptimizationLevel: 'disabled',
    });
  } catch (error) {
    throw new Failure('The net could not be started.', `A newer browser may do it. ${error.message}`, true);
  }
  async function classify(values) {
    const images = new ort.Tensor('float32', values, [1, 3, net.size, net.size]);
    const start = performance.now();
    const { logits } = await session.run({ pixel_values: images });
    return { milliseconds: performance.now() - start, probabilities: softmax(logits.data) };
  }
  await classify(new Float32Array(3 * net.size ** 2)); // the first run compiles, and tells no one's time
  return { bytes: { net: model.byteLength, runtime: bytes }, classify };
});

function softmax(logits) {
  const largest = Math.max(...logits);
  const values = Array.from(logits, (x) => Math.exp(x - largest));
  const sum = values.reduce((a, b) => a + b);
  return values.map((x) => x / sum);
}
